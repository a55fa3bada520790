//! Tests of whole engines, through their public interface.

mod cache;
mod common;
mod directories;
mod golden_bits;
mod goldens;
mod hostile;
mod hostile_directories;
mod layers;
mod naive;
mod resume;
mod same_bits;
