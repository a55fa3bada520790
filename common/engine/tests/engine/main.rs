//! Tests of whole engines, through their public interface.

mod common;
mod goldens;
mod naive;
