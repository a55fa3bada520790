//! Which instructions the kernels use.

use std::{fmt, str::FromStr};

#[cfg(target_arch = "x86_64")]
use super::linear;

/// Instruction set of the kernels. All give the same bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Isa {
    /// Any CPU; the oracle of the others, and slow.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// As [`Avx512`](Self::Avx512), with matrices of bf16 multiplied by `vdpbf16ps`. On Intel's CPUs that is the slower way, and must be asked for.
    Avx512Bf16,
}

/// The CPU lacks the instruction set that was asked for, or the name is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnsupportedIsa {
    /// This CPU does not have it.
    #[error("this CPU has no {0} (it has {1})")]
    Missing(Isa, Isa),
    /// Not one of `portable`, `avx2`, `avx512`, `avx512bf16`.
    #[error("no instruction set is called '{0}' (portable, avx2, avx512, avx512bf16 are)")]
    Unknown(String),
}

impl Isa {
    /// All, slowest first, of a CPU where the last is of use.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The fastest that this CPU has.
    pub fn detect() -> Self {
        let fast = |isa: &&Isa| isa.available() && (**isa != Isa::Avx512Bf16 || bf16_dots_are_fast());
        *Self::ALL.iter().rfind(fast).unwrap_or(&Isa::Portable)
    }

    /// Whether this CPU has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                // SAFETY: the CPU has what `bf16_dots_hold` wants.
                #[allow(unsafe_code)]
                let holds = || unsafe { linear::bf16_dots_hold() };
                Isa::Avx512.available() && is_x86_feature_detected!("avx512bf16") && holds()
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
        }
    }

    /// `wanted` if this CPU has it; the fastest when nothing is wanted.
    pub fn choose(wanted: Option<Isa>) -> Result<Self, UnsupportedIsa> {
        match wanted {
            None => Ok(Self::detect()),
            Some(isa) if isa.available() => Ok(isa),
            Some(isa) => Err(UnsupportedIsa::Missing(isa, Self::detect())),
        }
    }
}

/// Whether `vdpbf16ps` is faster than two fma. By published tables it makes twice as many products on AMD's CPUs that have it (Zen 4 and 5); on Intel's,
/// half as many were measured (Emerald Rapids). See ADR 7.
fn bf16_dots_are_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx]
            .map(u32::to_le_bytes)
            .as_flattened()
            == b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        })
    }
}

impl FromStr for Isa {
    type Err = UnsupportedIsa;

    fn from_str(name: &str) -> Result<Self, UnsupportedIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| UnsupportedIsa::Unknown(name.into()))
    }
}
