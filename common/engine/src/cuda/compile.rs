//! Compiles a source of kernels to machine code, through NVRTC. Needs no GPU.
#![allow(unsafe_code)]

use std::ffi::CString;

use cudarc::nvrtc::{result, sys};

use super::{KernelSource, PRELUDE};

/// Why kernels could not be compiled.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CompileError {
    /// NVRTC is not on this host, or the dynamic linker does not find it.
    #[error("NVRTC (libnvrtc.so.13) was not found; it comes with CUDA 13, or from PyPI as nvidia-cuda-nvrtc")]
    Missing,
    /// The compiler refuses the source, or the architecture.
    #[error("kernels '{name}' do not compile for {arch}: {log}")]
    Refused {
        /// The source.
        name: &'static str,
        /// Architecture that was asked for.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// NVRTC itself failed.
    #[error("NVRTC: {0}")]
    Failed(String),
}

impl CompileError {
    /// A stable code for logs. No retry helps.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "cuda_nvrtc_missing",
            Self::Refused { .. } => "cuda_compile_refused",
            Self::Failed(_) => "cuda_compile_failed",
        }
    }
}

/// Machine code (a cubin) of a source's kernels for `arch`, e.g. `sm_90`.
///
/// # Errors
/// As [`CompileError`] says; never a panic where NVRTC is missing.
pub fn compile(source: &KernelSource, arch: &str) -> Result<Vec<u8>, CompileError> {
    // SAFETY: loads the library, and runs its initialisers, as anything that links it does.
    if !unsafe { sys::is_culib_present() } {
        return Err(CompileError::Missing);
    }
    let failed = |error: result::NvrtcError| CompileError::Failed(format!("{error:?}"));
    let whole = CString::new(format!("{PRELUDE}\n#line 1\n{}", source.text))
        .map_err(|error| CompileError::Failed(error.to_string()))?;
    let program = result::create_program(&whole, None).map_err(failed)?;
    let options = [format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    // SAFETY: `program` is live until it is destroyed below, once, and used by this thread alone.
    unsafe {
        let code = match result::compile_program(program, &options) {
            Ok(()) => cubin(program),
            Err(_) => Err(CompileError::Refused {
                name: source.name,
                arch: arch.to_owned(),
                log: result::get_program_log(program)
                    .map(|log| {
                        log.iter()
                            .map(|&byte| byte as u8 as char)
                            .filter(|&c| c != '\0')
                            .collect()
                    })
                    .unwrap_or_default(),
            }),
        };
        result::destroy_program(program).map_err(failed)?;
        code
    }
}

/// # Safety
/// `program` was compiled, and is live.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, CompileError> {
    let failed = |error: result::NvrtcError| CompileError::Failed(format!("{error:?}"));
    let mut bytes = 0;
    // SAFETY: the caller's promise; NVRTC writes as many bytes as it has said.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut bytes).result().map_err(failed)?;
        let mut code = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast())
            .result()
            .map_err(failed)?;
        Ok(code)
    }
}

#[cfg(test)]
mod tests;
