//! Prefill and decode nodes in this process, a real gRPC between them, and a router's end written by hand.

mod faults;
mod pair;
mod support;
