use clap::{CommandFactory, error::ErrorKind};

use super::*;

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

/// Every flag of every command says what it is for.
#[test]
fn every_flag_has_help() {
    fn check(command: &clap::Command) {
        for argument in command.get_arguments() {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                help.len() > 10,
                "baton {} {} has no help",
                command.get_name(),
                argument.get_id()
            );
        }
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}

fn check_parses(line: &str) {
    if let Err(error) = Cli::try_parse_from(line.split(' ')) {
        panic!("{line}: {error}");
    }
}

fn check_usage(line: &str, kind: ErrorKind) {
    let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
    assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{line}: {error}");
}

#[test]
fn lines_parse() {
    for line in [
        "baton up",
        "baton up --prefill 2 --decode 2 --grpc 127.0.0.1:0 --http localhost:8081 --threads 2 --kv-bytes 1GiB --model m.gguf",
        "baton up --prefill 0 --simulated --log debug --log-format json --otlp http://127.0.0.1:4317",
        "baton generate Hello --raw --max-tokens 5 --temperature 0.7 --seed 1 --stop . --stop ! --json",
        "baton generate --probe",
        "baton generate --tokens 1,2,3",
        "baton generate -",
        "baton chat --system short --timings",
        "baton model fetch --dir models",
        "baton model info",
        "baton model info org/name",
        "baton up --model org/name@v1/m.gguf",
        "baton router --grpc 127.0.0.1:0 --http 127.0.0.1:0 --model m.gguf --exit-when-stdin-closes",
        "baton prefill --grpc 127.0.0.1:0 --ops 127.0.0.1:0 --router http://127.0.0.1:7070 --model m.gguf --node-id prefill-0 --threads 1 --kv-bytes 1GiB",
        "baton decode --simulated --isa portable --exit-when-stdin-closes",
        "baton --log warn decode",
    ] {
        check_parses(line);
    }
}

#[test]
fn mistakes_are_usage_errors() {
    for (line, kind) in [
        ("baton generate", ErrorKind::MissingRequiredArgument),
        ("baton generate Hello --raw --system x", ErrorKind::ArgumentConflict),
        ("baton generate Hello --tokens 1", ErrorKind::ArgumentConflict),
        ("baton generate Hello --max-tokens many", ErrorKind::ValueValidation),
        ("baton up --decode 0", ErrorKind::ValueValidation),
        ("baton up --prefill 17", ErrorKind::ValueValidation),
        ("baton up --threads 0", ErrorKind::ValueValidation),
        ("baton up --kv-bytes much", ErrorKind::ValueValidation),
        ("baton up --grpc 7070", ErrorKind::ValueValidation),
        ("baton up --grpc", ErrorKind::InvalidValue),
        ("baton up --speed 3", ErrorKind::UnknownArgument),
        ("baton decode --isa sse9", ErrorKind::ValueValidation),
        ("baton dance", ErrorKind::InvalidSubcommand),
        ("baton model", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
    ] {
        check_usage(line, kind);
    }
}
