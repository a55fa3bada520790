//! Connections to decode nodes, one per address, kept and bounded.
