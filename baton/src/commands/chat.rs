//! `baton chat`: a conversation. Ctrl-C cancels the current answer, Ctrl-D ends.

use std::{
    io::{BufRead, IsTerminal, stdin},
    thread,
};

use anyhow::Context;
use baton_proto::v1::Message;
use clap::Args;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    client::{self, AnswerArgs, Client, ClusterArgs, Part},
    output::{self, dim, write},
    report,
};

const PROMPT: &str = "› ";

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// A system message before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Show where the time went after each answer
    #[arg(long)]
    timings: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    answer: AnswerArgs,
}

/// How one turn ended.
enum Turn {
    /// With an answer, complete or as far as it came.
    Answered(String),
    /// Without one.
    Failed,
}

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.cluster.url, args.cluster.tls_ca.as_deref()).await?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut lines = read_lines()?;
    let terminal = stdin().is_terminal();
    if terminal {
        output::note(format_args!(
            "{}",
            dim("Ctrl-C cancels an answer, /new starts over, Ctrl-D ends.")
        ));
    }
    let mut messages = begin(&args);
    loop {
        if terminal {
            write(PROMPT)?;
        }
        let line = tokio::select! {
            line = lines.recv() => match line {
                Some(line) => line.context("cannot read stdin as UTF-8")?,
                None => break,
            },
            _ = interrupt.recv() => {
                output::note(format_args!("{}", dim("\n(Ctrl-D ends)")));
                continue;
            }
        };
        match line.trim() {
            "" => continue,
            "/new" => {
                messages = begin(&args);
                continue;
            }
            text => messages.push(client::message("user", text)),
        }
        match turn(&mut client, &args, messages.clone(), &mut interrupt).await? {
            Turn::Answered(text) => messages.push(client::message("assistant", &text)),
            Turn::Failed => {
                messages.pop();
            }
        }
    }
    if terminal {
        write("\n")?;
    }
    Ok(())
}

fn begin(args: &ChatArgs) -> Vec<Message> {
    args.system.iter().map(|text| client::message("system", text)).collect()
}

/// One answer to `messages`. Errors of the request are shown, and the conversation goes on; errors here are those of the terminal.
async fn turn(
    client: &mut Client,
    args: &ChatArgs,
    messages: Vec<Message>,
    interrupt: &mut Signal,
) -> anyhow::Result<Turn> {
    let request = args.answer.request(&args.cluster.model, client::chat(messages));
    let mut text = String::new();
    let failed = tokio::select! {
        outcome = stream(client, args, request, &mut text) => outcome?,
        _ = interrupt.recv() => {
            output::note(format_args!("{}", dim("\n(cancelled)")));
            None
        }
    };
    if let Some(error) = failed {
        output::note(format_args!("{error}"));
    }
    Ok(if text.is_empty() {
        Turn::Failed
    } else {
        Turn::Answered(text)
    })
}

async fn stream(
    client: &mut Client,
    args: &ChatArgs,
    request: baton_proto::v1::GenerateRequest,
    text: &mut String,
) -> anyhow::Result<Option<client::ClientError>> {
    let mut answer = match client.generate(request).await {
        Ok(answer) => answer,
        Err(error) => return Ok(Some(error)),
    };
    loop {
        match answer.next().await {
            Ok(Part::Started(_)) => {}
            Ok(Part::Text(more)) => {
                write(&more)?;
                *text += &more;
            }
            Ok(Part::Finished(finished)) => {
                write("\n")?;
                if args.timings {
                    output::note_part(format_args!("{}", dim(&report::table(&finished))));
                }
                return Ok(None);
            }
            Err(error) => {
                write("\n")?;
                return Ok(Some(error));
            }
        }
    }
}

/// Lines of stdin, read on a thread of their own since a read cannot be cancelled; it ends with the process.
fn read_lines() -> anyhow::Result<mpsc::Receiver<std::io::Result<String>>> {
    let (sender, receiver) = mpsc::channel(1);
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            for line in stdin().lock().lines() {
                if sender.blocking_send(line).is_err() {
                    break;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(receiver)
}
