//! Taking in a step's result.

use baton_kv::Pool;

use super::{Finished, Flight, Scheduler, Sequence};
use crate::{FinishReason, Role, Sampled, SequenceEvent, StepOutput};

impl Scheduler {
    /// Takes in the result of the planned step: names full blocks, emits events, gives back what ended.
    /// Panics if `output` is not one token per sampling span of the plan, in its order: tokens would go to the wrong sequences.
    pub fn complete(&mut self, output: &StepOutput, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        let mut flight = std::mem::take(&mut self.flight);
        let mut drawn = output.sampled.iter();
        for Flight { arrival, samples } in flight.drain(..) {
            let at = self.find(arrival);
            let token = samples.then(|| drawn.next().expect("a token for each sampling span"));
            if let Some(reason) = self.advance(at, token, pool, events) {
                self.finish(at, reason, pool, events);
            }
        }
        assert_eq!(drawn.next(), None, "more tokens than sampling spans");
        self.flight = flight;
    }

    /// The engine failed: ends every sequence of the step as cancelled, and names none of its blocks.
    pub fn failed(&mut self, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        let mut flight = std::mem::take(&mut self.flight);
        for Flight { arrival, .. } in flight.drain(..) {
            let at = self.find(arrival);
            self.finish(at, FinishReason::Cancelled, pool, events);
        }
        self.flight = flight;
    }

    fn find(&self, arrival: u64) -> usize {
        self.running
            .binary_search_by_key(&arrival, |sequence| sequence.arrival)
            .expect("what is in the step stays until it completes")
    }

    /// The rows of `running[at]` are in the pool, and its token, if one was to be drawn, is here. Returns whether it ended.
    fn advance(
        &mut self,
        at: usize,
        token: Option<&Sampled>,
        pool: &mut Pool,
        events: &mut Vec<SequenceEvent>,
    ) -> Option<FinishReason> {
        let block_tokens = self.config.block_tokens;
        let sequence = &mut self.running[at];
        let before = sequence.context;
        sequence.context += std::mem::take(&mut sequence.rows);
        sequence.name_full_blocks(block_tokens, pool);
        if let Some(token) = token {
            assert_eq!(
                token.sequence, sequence.id,
                "tokens come in the order of the sampling spans"
            );
        }
        if sequence.cancelled {
            return Some(FinishReason::Cancelled);
        }
        if before < sequence.prompt_len {
            let computed = sequence.context.min(sequence.prompt_len);
            events.push(SequenceEvent::Computed {
                id: sequence.id,
                computed,
                table: sequence.table[..computed.div_ceil(block_tokens)].to_vec(),
            });
        }
        let Sampled {
            token,
            logprob,
            alternatives,
            ..
        } = *token?;
        events.push(SequenceEvent::Token {
            id: sequence.id,
            index: sequence.output().len() as u32,
            token,
            logprob,
            alternatives: alternatives.to_vec(),
        });
        sequence.tokens.push(token);
        if sequence.stop_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        let last = sequence.role == Role::Prefill || sequence.output().len() >= sequence.max_new_tokens;
        last.then_some(FinishReason::Length)
    }

    fn finish(&mut self, at: usize, reason: FinishReason, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        let mut sequence = self.running.remove(at);
        let id = sequence.id;
        if sequence.role == Role::Prefill && reason != FinishReason::Cancelled {
            let table = std::mem::take(&mut sequence.table);
            self.finished.push(Finished { id, table });
        } else {
            sequence.give_back(pool);
        }
        events.push(SequenceEvent::Finished { id, reason });
    }
}

impl Sequence {
    /// Names the blocks that have filled up, of prompt and output alike.
    fn name_full_blocks(&mut self, block_tokens: usize, pool: &mut Pool) {
        let full = self.context / block_tokens;
        for at in self.named_blocks..full {
            let tokens = &self.tokens[at * block_tokens..(at + 1) * block_tokens];
            let name = pool.name(self.table[at], self.parent_of(at), tokens);
            if at == self.names.len() {
                self.names.push(name);
            }
        }
        self.named_blocks = full;
    }
}
