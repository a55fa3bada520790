//! Memory that a process holds.

use baton_engine::Engine;

/// Bytes of this process's memory that are resident, what it shares included; mapped files are apart. Nothing where the system does not say.
pub fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = |key: &str| -> Option<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    Some((kib("RssAnon:")? + kib("RssShmem:")?) * 1024.0)
}

/// Writes the whole pool, whose pages the system gives only then. Its bytes.
pub fn fill_pool(engine: &dyn Engine) -> f64 {
    let memory = engine.memory();
    let layout = *memory.layout();
    let piece = vec![0; layout.layer_block_bytes()];
    for layer in 0..layout.layers {
        for block in 0..memory.blocks() {
            let block = baton_kv::BlockId(block as u32);
            memory
                .write(layer, block, layout.block_tokens, &piece)
                .expect("a block of the pool");
        }
    }
    (layout.block_bytes() * memory.blocks()) as f64
}
