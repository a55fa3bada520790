//! CUDA: so far the kernels of its engine, and their compiler. The engine itself is not built yet.
//!
//! Nothing of CUDA is needed to build. A host with a driver and NVRTC compiles the kernels when they are wanted: each source is complete with the
//! prelude, and includes no header.

mod compile;

pub use compile::{CompileError, compile};

/// A source of kernels, without the prelude.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource {
    /// What its kernels are for.
    pub name: &'static str,
    /// CUDA C++ that follows [`PRELUDE`].
    pub text: &'static str,
}

/// What every source begins with.
pub const PRELUDE: &str = include_str!("cuda/kernels/prelude.cu");

/// All sources.
pub const KERNELS: [KernelSource; 5] = [
    KernelSource {
        name: "linear",
        text: include_str!("cuda/kernels/linear.cu"),
    },
    KernelSource {
        name: "rows",
        text: include_str!("cuda/kernels/rows.cu"),
    },
    KernelSource {
        name: "decode_attention",
        text: include_str!("cuda/kernels/decode_attention.cu"),
    },
    KernelSource {
        name: "prefill_attention",
        text: include_str!("cuda/kernels/prefill_attention.cu"),
    },
    KernelSource {
        name: "sample",
        text: include_str!("cuda/kernels/sample.cu"),
    },
];
