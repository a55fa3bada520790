//! The thread that computes.
//!
//! lock → plan → unlock → step → lock → complete → unlock, and sleep on the mailbox when there is nothing to run. Nothing asynchronous runs here.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use baton_engine::{Engine, StepError};
use baton_scheduler::{StepOutput, StepPlan};

use crate::{load::step_rows, metrics::TokenKind, shared::Shared};

/// Starts it. Errors: the system gives no thread.
pub(crate) fn spawn(mut engine: Box<dyn Engine>, shared: Arc<Shared>) -> std::io::Result<()> {
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        let panicked = catch_unwind(AssertUnwindSafe(|| run(engine.as_mut(), &shared))).is_err();
        if panicked {
            tracing::error!("the engine's thread has panicked: the node stops");
        }
        // Whoever still waits for a sequence must hear of it, before an engine is taken down that may take its time.
        shared.turn(|core, _| core.lose());
        let ended = shared.ended.clone();
        drop((shared, engine));
        ended.cancel();
    })?;
    Ok(())
}

fn run(engine: &mut dyn Engine, shared: &Shared) {
    let (mut plan, mut output) = (StepPlan::default(), StepOutput::default());
    engine.watch_layers(shared.last_chunks.watch());
    while !shared.mailbox.is_stopped() {
        let (planned, _) = shared.turn(|core, _| {
            let planned = core.plan(&mut plan);
            if planned {
                shared
                    .last_chunks
                    .begin(core.last_chunks(&plan, shared.last_chunks.bytes));
            } else {
                core.check_idle();
            }
            planned
        });
        if !planned {
            shared.mailbox.wait();
        } else if !step(engine, shared, &plan, &mut output) {
            return;
        }
    }
}

/// Runs one step and takes in its result. False when the engine is lost.
fn step(engine: &mut dyn Engine, shared: &Shared, plan: &StepPlan, output: &mut StepOutput) -> bool {
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| engine.step(plan, output)))
        .unwrap_or_else(|panic| Err(StepError::Lost(panic_message(panic.as_ref()))));
    let duration = started.elapsed();
    shared.last_chunks.end();
    match result {
        Ok(()) => {
            let (kind, prefill_rows, decode_rows) = step_rows(plan);
            shared.metrics.step(kind, plan.rows(), duration);
            shared.metrics.tokens(TokenKind::PromptComputed, prefill_rows);
            shared.turn(|core, _| {
                core.rates.observe(prefill_rows, decode_rows, duration);
                core.complete(output);
            });
            true
        }
        Err(error @ (StepError::Plan(_) | StepError::NotFinite)) => {
            tracing::error!(%error, "a step failed: its sequences end, and the node goes on");
            shared.turn(|core, now| core.step_refused(&error.to_string(), now));
            true
        }
        Err(StepError::Lost(message)) => {
            tracing::error!(message, "the engine is lost: the node stops");
            false
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the engine panicked".to_owned())
}
