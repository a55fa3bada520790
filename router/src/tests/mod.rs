//! The whole router over loopback, with nodes whose every word a test says itself.

mod answers;
mod choices;
mod edges;
mod failures;
mod harness;
mod openai;
