//! Progress on stderr: bars and spinners on a terminal, one plain line otherwise.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

const TICK: Duration = Duration::from_millis(120);
const SPINNER: &str = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ";

/// One thing that is going on.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Bytes of a known total.
    pub(crate) fn bytes(what: &str, total: u64) -> Self {
        let bar = Self::begin(ProgressBar::new(total), what);
        bar.set_style(style("{msg:24} {wide_bar:.cyan/dim} {bytes}/{total_bytes}"));
        Self { bar }
    }

    /// Bytes of an unknown total.
    pub(crate) fn spinner(what: &str) -> Self {
        let bar = Self::begin(ProgressBar::new_spinner(), what);
        bar.set_style(style("{spinner} {msg} {bytes} {elapsed}").tick_chars(SPINNER));
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    fn begin(bar: ProgressBar, what: &str) -> ProgressBar {
        if !stderr().is_terminal() {
            output::note(format_args!("{what}"));
        }
        bar.set_message(what.to_owned());
        bar
    }

    /// `done` bytes so far.
    pub(crate) fn at(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Removes it from the screen.
    pub(crate) fn done(&self) {
        self.bar.finish_and_clear();
    }
}

/// A line per process that starts.
#[derive(Debug)]
pub(crate) struct Starting {
    all: MultiProgress,
    terminal: bool,
}

impl Starting {
    pub(crate) fn new() -> Self {
        Self {
            all: MultiProgress::new(),
            terminal: stderr().is_terminal(),
        }
    }

    /// A spinner for `name`.
    pub(crate) fn line(&self, name: &str) -> StartingLine {
        let bar = self.all.add(ProgressBar::new_spinner());
        bar.set_style(style("{spinner} {prefix:12} {msg}").tick_chars(SPINNER));
        bar.set_prefix(name.to_owned());
        bar.set_message("starting");
        bar.enable_steady_tick(TICK);
        StartingLine {
            bar,
            name: name.to_owned(),
            terminal: self.terminal,
        }
    }
}

/// One process that starts.
#[derive(Debug)]
pub(crate) struct StartingLine {
    bar: ProgressBar,
    name: String,
    terminal: bool,
}

impl StartingLine {
    /// Something happened on its way.
    pub(crate) fn update(&self, message: &str) {
        self.bar.set_message(message.to_owned());
    }

    /// It loads: a bar; where there is no terminal, a line per stage.
    pub(crate) fn loading(&self, stage: &str, percent: u8) {
        if self.terminal {
            self.bar
                .set_style(style("{spinner} {prefix:12} {msg:28} {bar:30.cyan/dim} {pos:>3} %").tick_chars(SPINNER));
            self.bar.set_length(100);
            self.bar.set_position(percent.into());
            self.bar.set_message(stage.to_owned());
        } else if percent == 0 {
            output::note(format_args!("  {:12} {stage}", self.name));
        }
    }

    /// It is ready. The line stays.
    pub(crate) fn ready(&self, message: &str) {
        self.end("✓", message);
    }

    /// It is not going to be.
    pub(crate) fn failed(&self, message: &str) {
        self.end("✗", message);
    }

    fn end(&self, mark: &str, message: &str) {
        if self.terminal {
            self.bar.set_style(style(&format!("{mark} {{prefix:12}} {{msg}}")));
            self.bar.finish_with_message(message.to_owned());
        } else {
            output::note(format_args!("{mark} {:12} {message}", self.name));
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a valid template")
}
