//! Tests of whole engines, through their public interface.

mod common;
mod goldens;
mod hostile;
mod naive;
mod same_bits;
