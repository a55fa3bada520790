//! The router's pure part: who may come in, where it runs, who holds which blocks, and a request's life.
//!
//! No I/O, no clock, no task, no randomness: drivers pass events and the time, and do the actions.

pub mod admission;
pub mod member;
pub mod members;
pub mod pairs;
pub mod placement;
pub mod prefix_index;
pub mod request;
