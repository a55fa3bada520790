//! What the machine allows: how fast its threads read memory, and how fast they multiply 8-bit integers; and what that means for a model.

use std::path::Path;

use baton_engine::Engine;
use baton_gguf::Gguf;
use memmap2::{Advice, MmapMut};

use super::{median, seconds};

/// What a token costs, at least.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Bytes of all weights as held. Decode reads them once a step (the head is the embeddings, or as large).
    pub weight_bytes: f64,
    /// Bytes of a token's KV.
    pub kv_token_bytes: f64,
    /// Multiplications and additions of a token in the layers' matrices.
    pub layers: f64,
    /// The same in the head.
    pub head: f64,
}

impl Work {
    /// Of a GGUF file, as the engine holds it.
    pub fn of(path: &Path, engine: &dyn Engine) -> anyhow::Result<Self> {
        let gguf = Gguf::open(path)?;
        let numbers = |is: &dyn Fn(&str) -> bool| -> f64 {
            let matrices = gguf
                .tensors()
                .iter()
                .filter(|tensor| tensor.rows > 1 && is(&tensor.name));
            matrices.map(|tensor| (tensor.rows * tensor.columns) as f64).sum()
        };
        let head = if gguf.tensor("output.weight").is_some() {
            "output.weight"
        } else {
            "token_embd.weight"
        };
        let memory = engine.memory();
        Ok(Self {
            weight_bytes: engine.model().weight_bytes as f64,
            kv_token_bytes: memory.layout().token_bytes() as f64,
            layers: 2.0 * numbers(&|name| name.starts_with("blk.")),
            head: 2.0 * numbers(&|name| name == head),
        })
    }

    /// Tokens per second of prefill: the layers' matrices alone, attention and all else for nothing.
    pub fn prefill_limit(&self, int8_per_second: Option<f64>) -> Option<f64> {
        Some(int8_per_second? / self.layers)
    }

    /// Tokens per second of `sequences` sequences that decode together at about `context` tokens each: a step reads all weights and their KV, and multiplies.
    pub fn decode_limit(
        &self,
        bytes_per_second: f64,
        int8_per_second: Option<f64>,
        sequences: usize,
        context: usize,
    ) -> Option<f64> {
        let kv_bytes = (sequences * context) as f64 * self.kv_token_bytes;
        let read = sequences as f64 * bytes_per_second / (self.weight_bytes + kv_bytes);
        Some(int8_per_second.map_or(read, |int8| read.min(int8 / (self.layers + self.head))))
    }
}

/// Reads the same memory again and again, with several threads: the limit of anything that reads all of its weights at each step. Memory that fits into a
/// cache is read from there, as weights of that size would be.
pub struct ReadProbe {
    threads: usize,
    memory: MmapMut,
}

type Line = [u8; 64];

impl ReadProbe {
    /// Takes `bytes` of memory, in huge pages where the system gives them: the engine's weights lie in such, too.
    pub fn new(threads: usize, bytes: usize) -> std::io::Result<Self> {
        let mut memory = MmapMut::map_anon(bytes.next_multiple_of(4096))?;
        // Advice only.
        let _ = memory.advise(Advice::HugePage);
        memory.fill(1);
        Ok(Self { threads, memory })
    }

    /// Bytes per second: the best of several ways to read, each the median of three.
    pub fn bytes_per_second(&self) -> f64 {
        let ways = [lines::<1>, lines::<2>, lines::<4>, lines::<8>];
        ways.into_iter().map(|way| self.run(way)).fold(0.0, f64::max)
    }

    fn run(&self, way: fn(&[Line]) -> u64) -> f64 {
        // At least a gigabyte, so that starting threads costs nothing beside it.
        let passes = (1_usize << 30).div_ceil(self.memory.len());
        let (all, _) = self.memory.as_chunks();
        let run = || {
            seconds(|| {
                std::thread::scope(|scope| {
                    for part in all.chunks(all.len().div_ceil(self.threads)) {
                        scope.spawn(move || {
                            for _ in 0..passes {
                                std::hint::black_box(way(std::hint::black_box(part)));
                            }
                        });
                    }
                });
            })
        };
        (self.memory.len() * passes) as f64 / median((0..3).map(|_| run()).collect())
    }
}

/// Sums `STREAMS` parts of the memory side by side, into eight sums, so that memory is waited for and not the adder.
fn lines<const STREAMS: usize>(part: &[Line]) -> u64 {
    let len = part.len() / STREAMS;
    let streams: [&[Line]; STREAMS] = std::array::from_fn(|stream| &part[stream * len..][..len]);
    let mut sums = [0_u64; 8];
    for at in 0..len {
        for stream in &streams {
            let (words, _) = stream[at].as_chunks();
            for (sum, &word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(u64::from_ne_bytes(word));
            }
        }
    }
    sums.iter().fold(0, |all, &sum| all.wrapping_add(sum))
}

/// Multiplications and additions of 8-bit integers per second (each counts), of `threads` threads that work on registers alone: the limit of prefill. Nothing
/// where the CPU has no AVX-512 VNNI.
pub fn int8_per_second(threads: usize) -> Option<f64> {
    let operations = threads as f64 * multiply()?;
    let run = || {
        seconds(|| {
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(multiply);
                }
            });
        })
    };
    Some(operations / median((0..5).map(|_| run()).collect()))
}

/// Does some milliseconds of work, and says how many operations that was.
#[cfg(target_arch = "x86_64")]
fn multiply() -> Option<f64> {
    use std::arch::x86_64::{
        _mm512_add_epi32, _mm512_dpbusd_epi32, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_set1_epi32,
    };

    const TIMES: usize = 1 << 22;
    /// Hides the instruction's latency, at two a cycle.
    const SUMS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sums(a: i8, b: i8) -> i32 {
        let (a, b) = (_mm512_set1_epi8(a), _mm512_set1_epi8(b));
        let mut sums = [_mm512_set1_epi32(0); SUMS];
        for (index, sum) in sums.iter_mut().enumerate() {
            // Equal sums might become one.
            *sum = _mm512_set1_epi32(index as i32);
        }
        for _ in 0..TIMES {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        let mut all = _mm512_set1_epi32(0);
        for sum in sums {
            all = _mm512_add_epi32(all, sum);
        }
        _mm512_reduce_add_epi32(all)
    }

    let available = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni");
    if !available {
        return None;
    }
    // SAFETY: the CPU has these instructions.
    #[allow(unsafe_code)]
    std::hint::black_box(unsafe { sums(std::hint::black_box(1), std::hint::black_box(1)) });
    // 64 products and as many additions.
    Some((TIMES * SUMS * 128) as f64)
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply() -> Option<f64> {
    None
}
