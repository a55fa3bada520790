//! The front handle: what the edges call. Validates, tokenises, admits; then the request lives in a task of its own ([`crate::life`]).

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use baton_kv::{BlockName, RequestId, Salt, Time, TokenId, name_blocks};
use baton_node::{Lifecycle, Phase, clock, random};
use baton_proto::node::v1 as pb;
use baton_text::{Detokenizer, ModelText};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::{
    RouterConfig,
    choices::Choices,
    cluster::{Admitted, Cluster},
    core::{
        members::Shape,
        placement::Needs,
        request::{Life, LifeConfig},
    },
    error::{Field, GenerateError},
    intake::Intake,
    life::{Driver, Job},
    limits,
    metrics::RouterMetrics,
    request::{AnswerEvent, AnswerStream, GenerateRequest, Input, Model, Started},
    sampling,
    text::{AnswerText, Text},
    trace::{choice_span, new_span},
};

/// The router as its edges see it. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    inner: Arc<Inner>,
}

struct Inner {
    config: RouterConfig,
    text: Text,
    cluster: Cluster,
    metrics: RouterMetrics,
    lifecycle: Lifecycle,
    intake: Intake,
    /// [`limits::REQUESTS_IN_FLIGHT`].
    permits: Arc<Semaphore>,
    created: SystemTime,
}

impl Front {
    pub(crate) fn new(
        config: RouterConfig,
        text: ModelText,
        cluster: Cluster,
        metrics: RouterMetrics,
        lifecycle: Lifecycle,
    ) -> Self {
        let inner = Inner {
            config,
            text: Text::new(text),
            cluster,
            metrics,
            lifecycle,
            intake: Intake::new(),
            permits: Arc::new(Semaphore::new(limits::REQUESTS_IN_FLIGHT)),
            created: SystemTime::now(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Validates and tokenises the request, and admits it to the queue. Every error found until then is returned here, at once (bad input, unknown model, shed, no
    /// nodes); a later one is the stream's last item. The first item is `Started`.
    ///
    /// Cancel-safe: dropping the future, or the stream, cancels the request.
    pub async fn generate(&self, request: GenerateRequest) -> Result<AnswerStream, GenerateError> {
        let arrived = clock::now();
        let span = if request.span.is_none() {
            new_span()
        } else {
            request.span.clone()
        };
        let mut left = Left {
            metrics: &self.inner.metrics,
            span: &span,
            arrived,
            waits: true,
        };
        let admitted = self.admit(request, arrived, &span).instrument(span.clone()).await;
        left.waits = false;
        admitted.inspect_err(|error| {
            span.record("outcome", error.code());
            span.in_scope(|| tracing::info!(code = error.code(), "not admitted: {error}"));
            self.inner.metrics.ended(error.code(), since(arrived));
        })
    }

    async fn admit(&self, request: GenerateRequest, arrived: Time, span: &Span) -> Result<AnswerStream, GenerateError> {
        let Inner {
            text,
            cluster,
            metrics,
            lifecycle,
            config,
            ..
        } = &*self.inner;
        if lifecycle.phase() >= Phase::Draining {
            return Err(GenerateError::Draining);
        }
        self.check_n(request.n)?;
        let held = (self.permit(request.n)?, metrics.arrived());
        self.check_model(request.model.as_deref())?;
        let checked = Checked::new(&request, text)?;
        let deadline = arrived.after_ms(checked.timeout.as_millis() as u64);
        // Before the prompt is looked at, so that nothing is computed in vain.
        let shape = cluster
            .shape()
            .filter(|_| cluster.ready())
            .ok_or(GenerateError::NoNodes)?;
        let context = shape.context_length.min(text.model().context_length);
        let prompt = self.encode(request.input, context, deadline).await?;
        let left = context - prompt.len();
        let max_new_tokens = request.max_tokens.map_or(left, |max| left.min(max as usize)) as u32;
        let seed = request.sampling.seed.unwrap_or_else(random::seed);
        let id = random::request_id();
        span.record("request_id", id.to_string());
        span.record("prompt_tokens", prompt.len());
        let root = BlockName::root(&shape.identity, &Salt::derive(&config.secret, &request.tenant.0));
        let needs = Needs {
            prompt_tokens: prompt.len(),
            names: name_blocks(root, &prompt, shape.layout.block_tokens),
            identity: shape.identity,
            beside: None,
        };
        let mut stop_ids = request.stop_token_ids;
        if !request.ignore_eos {
            stop_ids.extend_from_slice(&text.model().eos_ids);
        }
        stop_ids.sort_unstable();
        stop_ids.dedup();

        let (events, receiver) = mpsc::channel(limits::TOKEN_CHANNEL);
        let started = Started {
            request_id: id,
            model: text.model().name.to_owned(),
            prompt_tokens: prompt.len() as u32,
            seed,
        };
        let texts = (0..request.n).map(|_| text.answer(request.stop.clone()));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let others = (1..u128::from(request.n)).map(|choice| RequestId(id.0.wrapping_add(choice)));
        let queue_deadline = deadline.min(clock::now().after_ms(config.queue_timeout.as_millis() as u64));
        let admitted = cluster.submit(id, others.collect(), needs, queue_deadline)?;
        let _ = events.try_send(Ok(AnswerEvent::Started(started)));
        let over = CancellationToken::new();
        let choices = Arc::new(Choices::new(
            request.n,
            arrived,
            deadline,
            metrics.clone(),
            events,
            over.clone(),
            lifecycle.shutdown_token(),
            span.clone(),
            held,
        ));
        let work = work(
            &shape,
            prompt,
            max_new_tokens,
            stop_ids,
            sampling::to_proto(request.sampling, seed, request.top_logprobs),
            root,
        );
        for (choice, (admitted, text)) in (0..).zip(admitted.into_iter().zip(texts)) {
            let job = Job {
                choice,
                work: of_choice(&work, choice, admitted.request()),
                logprobs: request.logprobs,
                router: config.router_id.clone(),
            };
            self.start(job, queue_deadline, admitted, text, choices.clone(), span);
        }
        Ok(AnswerStream::new(
            receiver,
            request.n,
            over.drop_guard(),
            lifecycle.requests().token(),
        ))
    }

    /// Lets a choice live.
    fn start(
        &self,
        job: Job,
        queue_deadline: Time,
        admitted: Admitted,
        text: AnswerText,
        choices: Arc<Choices>,
        span: &Span,
    ) {
        let config = LifeConfig {
            reserve_ms: limits::RESERVE_MS,
            closing_ms: limits::CLOSING_MS,
            replace_ms: limits::REPLACE_MS,
            max_attempts: limits::ATTEMPTS,
            max_losses: limits::LOSSES,
            vocabulary: self.inner.text.model().tokenizer.vocabulary_len(),
        };
        // A further choice waits for the first, and its answer is under way by then: it has the time that the request has.
        let (queue_deadline, span) = match job.choice {
            0 => (queue_deadline, span.clone()),
            choice => (choices.deadline, choice_span(span, choice)),
        };
        let life = Life::new(
            config,
            clock::now(),
            queue_deadline,
            choices.deadline,
            job.work.max_new_tokens,
        );
        let driver = Driver::new(life, self.inner.cluster.clone(), admitted, job, text, choices);
        self.inner.lifecycle.requests().spawn(driver.run().instrument(span));
    }

    fn permit(&self, choices: u32) -> Result<OwnedSemaphorePermit, GenerateError> {
        let permit = self.inner.permits.clone().try_acquire_many_owned(choices);
        permit.map_err(|_| GenerateError::QueueFull {
            limit: limits::REQUESTS_IN_FLIGHT,
            retry_after: limits::SHED_RETRY,
        })
    }

    /// More choices than may ever wait are refused, since no retry would help.
    fn check_n(&self, n: u32) -> Result<(), GenerateError> {
        let most = (limits::CHOICES as usize).min(self.inner.config.admission.max_queue);
        if (1..=most).contains(&(n as usize)) {
            return Ok(());
        }
        Err(invalid(Field::N, format!("must be between 1 and {most}, not {n}")))
    }

    async fn encode(&self, input: Input, context: usize, deadline: Time) -> Result<Vec<TokenId>, GenerateError> {
        let left = Duration::from_millis(clock::now().ms_until(deadline));
        let encoded = self.inner.text.encode(input, context.saturating_sub(1));
        let passed = |_| GenerateError::DeadlineExceeded("before the prompt was tokenised");
        timeout(left, encoded).await.map_err(passed)?
    }

    fn check_model(&self, model: Option<&str>) -> Result<(), GenerateError> {
        let served = self.inner.text.model().name.as_str();
        match model {
            Some(model) if model != served => Err(GenerateError::UnknownModel {
                model: model.chars().take(limits::IDENTIFIER_BYTES).collect(),
                served: served.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// What edges receive bodies through.
    pub(crate) fn intake(&self) -> &Intake {
        &self.inner.intake
    }

    /// The ids of a prompt, as `generate` would see them.
    pub async fn tokenize(&self, model: Option<&str>, input: Input) -> Result<Vec<TokenId>, GenerateError> {
        let _permit = self.permit(1)?;
        self.check_model(model)?;
        in_time(self.inner.text.encode(input, limits::INPUT_TOKENS)).await
    }

    /// The text of ids.
    pub async fn detokenize(&self, model: Option<&str>, ids: Vec<TokenId>) -> Result<String, GenerateError> {
        let _permit = self.permit(1)?;
        self.check_model(model)?;
        in_time(self.inner.text.decode(ids)).await
    }

    /// Turns the ids of one answer into text.
    pub(crate) fn detokenizer(&self) -> Detokenizer {
        self.inner.text.model().detokenizer()
    }

    /// The bytes of one id alone, which may be no whole character: for lists of log-probabilities. Empty outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        let bytes = self.inner.text.model().tokenizer.token_bytes(id);
        bytes.map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// The models that can be asked: one per router.
    pub fn models(&self) -> Vec<Model> {
        let text = self.inner.text.model();
        let shape = self.inner.cluster.shape();
        let context = shape.map_or(usize::MAX, |shape| shape.context_length);
        vec![Model {
            id: text.name.to_owned(),
            context_length: context.min(text.context_length) as u32,
            vocabulary: text.tokenizer.vocabulary_len() as u32,
            kv_identity: shape.map(|shape| shape.identity),
            created: self.inner.created,
        }]
    }

    /// Whether a request could be served now: at least one decode node is ready, and this router is not draining.
    pub fn ready(&self) -> bool {
        self.inner.lifecycle.phase() == Phase::Ready && self.inner.cluster.ready()
    }
}

/// Says so if a client leaves before its request is admitted.
struct Left<'a> {
    metrics: &'a RouterMetrics,
    span: &'a Span,
    arrived: Time,
    waits: bool,
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if self.waits {
            let error = GenerateError::Cancelled;
            self.span.record("outcome", error.code());
            self.metrics.ended(error.code(), since(self.arrived));
        }
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, GenerateError>>) -> Result<T, GenerateError> {
    let passed = |_| GenerateError::DeadlineExceeded("before its turn had come");
    timeout(limits::TOKENISE, call).await.map_err(passed)?
}

/// What was found right.
struct Checked {
    timeout: Duration,
}

impl Checked {
    fn new(request: &GenerateRequest, text: &Text) -> Result<Self, GenerateError> {
        sampling::check(&request.sampling, text)?;
        if request.top_logprobs > limits::TOP_LOGPROBS {
            let (asked, limit) = (request.top_logprobs, limits::TOP_LOGPROBS);
            return Err(invalid(
                Field::TopLogprobs,
                format!("must be between 0 and {limit}, not {asked}"),
            ));
        }
        if request.top_logprobs > 0 && !request.logprobs {
            return Err(invalid(Field::TopLogprobs, "needs logprobs".to_owned()));
        }
        if request.max_tokens == Some(0) {
            return Err(invalid(Field::MaxTokens, "must be at least 1".to_owned()));
        }
        if request.stop.len() > limits::STOP_STRINGS {
            let problem = format!(
                "{} stop strings; at most {} are taken",
                request.stop.len(),
                limits::STOP_STRINGS
            );
            return Err(invalid(Field::Stop, problem));
        }
        for stop in &request.stop {
            let chars = stop.chars().count();
            if !(1..=limits::STOP_STRING_CHARS).contains(&chars) {
                let limit = limits::STOP_STRING_CHARS;
                return Err(invalid(
                    Field::Stop,
                    format!("a stop string has 1 to {limit} characters, not {chars}"),
                ));
            }
        }
        if request.stop_token_ids.len() > limits::STOP_TOKEN_IDS {
            let (count, limit) = (request.stop_token_ids.len(), limits::STOP_TOKEN_IDS);
            return Err(invalid(
                Field::StopTokenIds,
                format!("{count} ids; at most {limit} are taken"),
            ));
        }
        text.check_ids(&request.stop_token_ids, Field::StopTokenIds)?;
        let timeout = request.timeout.unwrap_or(limits::REQUEST_TIMEOUT_DEFAULT);
        Ok(Self {
            timeout: timeout.min(limits::REQUEST_TIMEOUT_MAX),
        })
    }
}

fn invalid(field: Field, problem: String) -> GenerateError {
    GenerateError::InvalidField { field, problem }
}

fn since(arrived: Time) -> Duration {
    Duration::from_micros(clock::now().0.saturating_sub(arrived.0))
}

/// The request as nodes see it; the choice's own is added by [`of_choice`], attempt and remaining time at each dispatch.
fn work(
    shape: &Shape,
    prompt: Vec<TokenId>,
    max_new_tokens: u32,
    stop_ids: Vec<TokenId>,
    sampling: pb::Sampling,
    root: BlockName,
) -> pb::Work {
    pb::Work {
        request_id: Vec::new(),
        attempt: 0,
        prompt,
        output: Vec::new(),
        max_new_tokens,
        stop_ids,
        sampling: Some(sampling),
        root: root.0.to_vec(),
        kv_identity: shape.identity.0.to_vec(),
        deadline_ms: 0,
    }
}

fn of_choice(work: &pb::Work, choice: u32, id: RequestId) -> pb::Work {
    let mut work = work.clone();
    work.request_id = id.to_bytes().to_vec();
    if let Some(sampling) = &mut work.sampling {
        sampling.choice = choice;
    }
    work
}
