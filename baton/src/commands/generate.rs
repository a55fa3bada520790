//! `baton generate`: one prompt, its answer as it comes, and where the time went.

use std::io::{Read, stdin};

use anyhow::Context;
use baton_proto::v1::{Started, generate_request::Input};
use clap::Args;

use crate::{
    client::{self, Answer, AnswerArgs, Client, ClusterArgs, Part},
    output, report,
};

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The prompt; - reads it from stdin
    #[arg(value_name = "PROMPT", required_unless_present_any = ["probe", "tokens"])]
    prompt: Option<String>,
    /// Send the prompt as it is, for the model to continue, without the chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// Send these token ids as the prompt, as in 1,5,9
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "raw", "system"])]
    tokens: Vec<u32>,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Print one JSON object at the end instead of streaming text and a table
    #[arg(long)]
    json: bool,
    /// Print the answer only, without the table
    #[arg(long, short)]
    quiet: bool,
    /// Only see whether a cluster is there that can answer: exit 0 if so, 1 if not
    #[arg(long)]
    probe: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    answer: AnswerArgs,
}

pub(crate) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    if args.probe {
        return probe(&args.cluster).await;
    }
    let request = args.answer.request(&args.cluster.model, input(&args)?);
    let answer = async {
        let mut client = Client::connect(&args.cluster.url, args.cluster.tls_ca.as_deref()).await?;
        show(client.generate(request).await?, &args).await
    };
    tokio::select! {
        shown = answer => shown,
        // Dropping the stream cancels the request on every node.
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("cannot listen for Ctrl-C")?;
            anyhow::bail!("cancelled");
        }
    }
}

async fn probe(cluster: &ClusterArgs) -> anyhow::Result<()> {
    let mut client = Client::connect(&cluster.url, cluster.tls_ca.as_deref()).await?;
    anyhow::ensure!(
        client.serving().await?,
        "the router at {} has no node that decodes yet",
        cluster.url
    );
    output::line(client.models().await?.join("\n"))
}

fn input(args: &GenerateArgs) -> anyhow::Result<Input> {
    if !args.tokens.is_empty() {
        return Ok(client::tokens(args.tokens.clone()));
    }
    let mut prompt = args.prompt.clone().unwrap_or_default();
    if prompt == "-" {
        prompt.clear();
        stdin()
            .read_to_string(&mut prompt)
            .context("cannot read the prompt from stdin as UTF-8")?;
    }
    if args.raw {
        return Ok(Input::Text(prompt));
    }
    let system = args.system.iter().map(|text| client::message("system", text));
    Ok(client::chat(system.chain([client::message("user", &prompt)]).collect()))
}

async fn show(mut answer: Answer, args: &GenerateArgs) -> anyhow::Result<()> {
    let mut text = String::new();
    let mut started = Started::default();
    loop {
        match answer.next().await? {
            Part::Started(of) => started = of,
            Part::Text(more) => {
                if !args.json {
                    output::write(&more)?;
                }
                text += &more;
            }
            Part::Finished(finished) => {
                if args.json {
                    output::line(report::json(
                        &started.request_id,
                        started.seed,
                        &text,
                        answer.ids(),
                        &finished,
                    ))?;
                } else {
                    if !text.ends_with('\n') {
                        output::write("\n")?;
                    }
                    if !args.quiet {
                        output::note_part(format_args!("\n{}", output::dim(&report::table(&finished))));
                    }
                }
                return Ok(());
            }
        }
    }
}
