use super::*;
use crate::cuda::KERNELS;

/// `make test` brings NVRTC along, and says so; elsewhere its absence must be told by name.
#[test]
fn every_kernel_compiles_for_ampere_and_hopper() {
    let expected = std::env::var_os("BATON_NVRTC").is_some();
    for source in &KERNELS {
        for arch in ["sm_80", "sm_90"] {
            match compile(source, arch) {
                Ok(code) => assert!(
                    code.starts_with(b"\x7fELF"),
                    "{} for {arch} is no machine code",
                    source.name
                ),
                Err(CompileError::Missing) if !expected => {
                    println!("NVRTC was not found: no kernel was compiled. `make test` installs it.");
                    assert_eq!(CompileError::Missing.code(), "cuda_nvrtc_missing");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_wrong_source_is_refused_with_the_compilers_words() {
    let source = KernelSource {
        name: "wrong",
        text: "extern \"C\" __global__ void f() { undeclared(); }",
    };
    match compile(&source, "sm_90") {
        Err(CompileError::Refused { name: "wrong", log, .. }) => assert!(log.contains("undeclared"), "{log}"),
        Err(CompileError::Missing) => assert!(std::env::var_os("BATON_NVRTC").is_none(), "NVRTC was not found"),
        other => panic!("{other:?}"),
    }
}
