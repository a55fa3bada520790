//! Baton, the one binary: parses the command line, wires the crates, exits.

mod cli;
mod client;
mod commands;
mod models;
mod output;
mod panel_cache;
mod process;
mod progress;
mod report;
mod user_cache;

use std::process::ExitCode;

use clap::Parser;

use crate::{
    cli::{Cli, Command},
    commands::{chat, generate, model, node, router, up},
    process::UsageError,
};

fn main() -> ExitCode {
    baton_node::heap::keep_freed();
    let Cli { telemetry, command } = Cli::parse();
    let outcome = match command {
        Command::Up(args) => process::client(&telemetry, up::run(args, &telemetry)),
        Command::Generate(args) => process::client(&telemetry, generate::run(args)),
        Command::Chat(args) => process::client(&telemetry, chat::run(args)),
        Command::Model(command) => process::client(&telemetry, model::run(command)),
        Command::Router(command) => router::run(*command, &telemetry),
        Command::Prefill(command) => node::prefill(*command, &telemetry),
        Command::Decode(command) => node::decode(*command, &telemetry),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format_args!("baton: {error:#}"));
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
    }
}
