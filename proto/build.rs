//! Generates the wire types and services from the contracts in `proto/`.

use std::{env, path::PathBuf};

fn main() -> std::io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let protos = ["proto/baton/v1/generation.proto", "proto/baton/node/v1/node.proto"];
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("baton.bin"))
        .bytes(".baton.node.v1.Piece.data")
        .bytes(".baton.node.v1.Pieces.data")
        .bytes(".baton.node.v1.ProbeFrame.data")
        .compile_protos(&protos, &["proto"])
}
