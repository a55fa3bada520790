//! The public gRPC API, as a test asks it.

use std::time::Duration;

use baton_proto::v1::generate_event::Event;
use baton_proto::v1::generation_client::GenerationClient;
use baton_proto::v1::{
    Finished, GenerateEvent, GenerateRequest, Output, Sampling, Started, Stopping, TokenIds, TopLogprobs,
    generate_request::Input,
};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::Cluster;

/// No test waits longer for one event.
pub const EVENT_LIMIT: Duration = Duration::from_secs(120);

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The first event.
    pub started: Started,
    /// Token ids.
    pub ids: Vec<u32>,
    /// Log-probabilities as bits, so that equality means equality.
    pub logprobs: Vec<u32>,
    /// Of each token the alternatives, with the bits of their log-probabilities, where they were asked for.
    pub top_logprobs: Vec<Vec<(u32, u32)>>,
    /// Text.
    pub text: String,
    /// The last event.
    pub finished: Finished,
}

/// Connects to the router.
pub async fn connect(cluster: &Cluster) -> GenerationClient<Channel> {
    GenerationClient::connect(format!("http://{}", cluster.router.grpc))
        .await
        .expect("the router listens")
}

/// A request for `max_tokens` greedy tokens after `prompt`, with log-probabilities.
pub fn greedy(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::Tokens(TokenIds { ids: prompt.to_vec() })),
        stopping: Some(Stopping {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Stopping::default()
        }),
        output: Some(Output {
            logprobs: Some(true),
            ..Output::default()
        }),
        ..GenerateRequest::default()
    }
}

/// The same, sampled with a seed.
pub fn sampled(prompt: &[u32], max_tokens: u32, seed: u64) -> GenerateRequest {
    GenerateRequest {
        sampling: Some(Sampling {
            temperature: Some(0.9),
            top_k: Some(50),
            top_p: Some(0.95),
            seed: Some(seed),
            ..Sampling::default()
        }),
        ..greedy(prompt, max_tokens)
    }
}

/// The same with every penalty, a bias against ids 0 to 9, and as many alternatives as there may be.
pub fn penalised(prompt: &[u32], max_tokens: u32, seed: u64) -> GenerateRequest {
    let mut request = sampled(prompt, max_tokens, seed);
    let sampling = request.sampling.get_or_insert_default();
    sampling.repetition_penalty = Some(1.2);
    sampling.presence_penalty = Some(0.5);
    sampling.frequency_penalty = Some(0.25);
    sampling.logit_bias = (0..10).map(|id| (id, -100.0)).collect();
    request.output.get_or_insert_default().top_logprobs = Some(20);
    request
}

/// Asks for text: `prompt` as it is.
pub fn text(prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::Text(prompt.to_owned())),
        ..greedy(&[], max_tokens)
    }
}

/// The next event of a stream, under a deadline.
pub async fn next(stream: &mut Streaming<GenerateEvent>) -> Result<Option<GenerateEvent>, Status> {
    tokio::time::timeout(EVENT_LIMIT, stream.message())
        .await
        .expect("an event, or an end, in time")
}

/// Runs a request for one choice to its end, as [`choices`] does.
pub async fn run(client: &mut GenerationClient<Channel>, request: GenerateRequest) -> Result<Answer, Status> {
    let mut answers = choices(client, request).await?;
    assert_eq!(answers.len(), 1);
    Ok(answers.remove(0))
}

/// Runs a request to its end, checking what every stream must keep: sequence numbers and indices without gap or repeat,
/// first `Started`, last of each choice `Finished`, nothing after it.
pub async fn choices(client: &mut GenerationClient<Channel>, request: GenerateRequest) -> Result<Vec<Answer>, Status> {
    let n = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1) as usize;
    let mut stream = client.generate(request).await?.into_inner();
    let mut answers = vec![Answer::default(); n];
    let mut ended = vec![false; n];
    let (mut sequence, mut begun) = (0, false);
    while let Some(event) = next(&mut stream).await? {
        assert_eq!(event.sequence, sequence, "sequence numbers have no gap and no repeat");
        sequence += 1;
        match event.event.expect("an event that this client knows") {
            Event::Started(started) => {
                assert!(!begun, "Started comes once");
                begun = true;
                for answer in &mut answers {
                    answer.started = started.clone();
                }
            }
            Event::Delta(delta) => {
                assert!(begun, "Started comes first");
                let choice = delta.choice as usize;
                assert!(!ended[choice], "an event after the last");
                let answer = &mut answers[choice];
                assert_eq!(
                    delta.index as usize,
                    answer.ids.len(),
                    "indices have no gap and no repeat"
                );
                answer.ids.extend(delta.ids);
                answer
                    .logprobs
                    .extend(delta.logprobs.iter().map(|value| value.to_bits()));
                let pairs = |top: TopLogprobs| {
                    top.tokens
                        .iter()
                        .map(|token| (token.id, token.logprob.to_bits()))
                        .collect()
                };
                answer.top_logprobs.extend(delta.top_logprobs.into_iter().map(pairs));
                answer.text.push_str(&delta.text);
            }
            Event::Finished(finished) => {
                let choice = finished.choice as usize;
                assert!(!ended[choice], "Finished comes once");
                ended[choice] = true;
                answers[choice].finished = finished;
            }
        }
    }
    assert!(
        ended.iter().all(|ended| *ended),
        "a stream that ends well ends with Finished, for each choice"
    );
    Ok(answers)
}
