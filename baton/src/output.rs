//! What commands write: results to stdout, everything else to stderr.

use std::io::{IsTerminal, Write, stderr, stdout};

use anyhow::Context;

/// Writes to stdout at once. Fails when nobody reads, instead of panicking as `println!` does.
pub(crate) fn write(text: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to stdout")
}

/// A line for stdout.
pub(crate) fn line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    write(&format!("{text}\n"))
}

/// A line for stderr. Nobody may be reading it; that decides nothing.
pub(crate) fn note(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(stderr(), "{text}");
}

/// Text for stderr, without the end of a line.
pub(crate) fn note_part(text: std::fmt::Arguments<'_>) {
    let _ = write!(stderr(), "{text}");
}

/// Text for stderr that stands back on a terminal.
pub(crate) fn dim(text: &str) -> String {
    if stderr().is_terminal() {
        format!("\x1b[2m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}
