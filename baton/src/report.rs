//! What is shown after an answer: where the time went, which node did what, and what crossed between them.

use std::fmt::Write;

use baton_node::ByteSize;
use baton_proto::v1::{FinishReason, Finished, finished::Matched};
use serde_json::{Value, json};

/// Bar of the widest stage, characters.
const BAR: usize = 24;

struct Row {
    stage: &'static str,
    ms: f64,
    place: String,
    what: String,
}

/// The table, with a line for each stage.
pub(crate) fn table(finished: &Finished) -> String {
    let rows = rows(finished);
    let longest = rows.iter().map(|row| row.ms).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let place = rows.iter().map(|row| row.place.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for row in &rows {
        let filled = ((row.ms.max(0.0) / longest) * BAR as f64).round() as usize;
        let bar = "█".repeat(filled.max(usize::from(row.ms > 0.0)));
        let (stage, time, place_of) = (row.stage, ms(row.ms), &row.place);
        let line = format!(
            "  {stage:<11} {time:>10}  {bar:<BAR$}  {place_of:<place$}  {}",
            row.what
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out.push_str(&summary(finished));
    out
}

fn rows(finished: &Finished) -> Vec<Row> {
    let usage = finished.usage.unwrap_or_default();
    let time = finished.timings.unwrap_or_default();
    let served = finished.served.clone().unwrap_or_default();
    let handed = !served.prefill_node.is_empty() && !served.decode_node.is_empty();
    let prefill = if served.prefill_node.is_empty() {
        &served.decode_node
    } else {
        &served.prefill_node
    };
    let decode = if served.decode_node.is_empty() {
        &served.prefill_node
    } else {
        &served.decode_node
    };
    let row = |stage, ms, place: &str, what| Row {
        stage,
        ms,
        place: place.to_owned(),
        what,
    };

    let prompt = match usage.cached_tokens {
        0 => format!("{} prompt tokens", usage.prompt_tokens),
        cached => format!("{} prompt tokens, {cached} of them cached", usage.prompt_tokens),
    };
    let mut rows = vec![
        row("queue", time.queue_ms, &served.router, String::new()),
        row("prefill", time.prefill_ms, prefill, prompt),
    ];
    if handed {
        let crossed = format!(
            "{}, {} by {}",
            count(served.kv_blocks, "KV block"),
            ByteSize(served.kv_bytes),
            served.transport
        );
        rows.push(row(
            "transfer",
            time.transfer_ms,
            &format!("{prefill} → {decode}"),
            crossed,
        ));
    }
    if usage.completion_tokens > 1 {
        rows.push(row(
            "first step",
            time.first_step_ms,
            decode,
            "the second token".to_owned(),
        ));
    }
    if usage.completion_tokens > 2 {
        let rest = time.total_ms - time.ttft_ms - time.first_step_ms;
        let tokens = usage.completion_tokens - 2;
        let each = format!("{}, {} each", count(tokens, "more token"), ms(rest / f64::from(tokens)));
        rows.push(row("decode", rest, decode, each));
    }
    rows
}

fn summary(finished: &Finished) -> String {
    let usage = finished.usage.unwrap_or_default();
    let time = finished.timings.unwrap_or_default();
    let mut line = format!(
        "  {}: first after {}, all after {}",
        count(usage.completion_tokens, "token"),
        ms(time.ttft_ms),
        ms(time.total_ms)
    );
    if let Some(rate) = tokens_per_s(finished) {
        let _ = write!(line, ", {rate:.1} tokens/s");
    }
    let _ = write!(line, "; ended by {}", ended_by(finished));
    if let Some(served) = &finished.served
        && served.attempts > 1
    {
        let _ = write!(line, "; {} attempts", served.attempts);
    }
    line.push('\n');
    line
}

/// Decode speed, without the first token; `None` for fewer than two.
fn tokens_per_s(finished: &Finished) -> Option<f64> {
    let (usage, time) = (finished.usage?, finished.timings?);
    let seconds = (time.total_ms - time.ttft_ms) / 1e3;
    (usage.completion_tokens > 1 && seconds > 0.0).then(|| f64::from(usage.completion_tokens - 1) / seconds)
}

fn ended_by(finished: &Finished) -> String {
    match (finished.reason(), &finished.matched) {
        (_, Some(Matched::Stop(text))) => format!("the stop text {text:?}"),
        (_, Some(Matched::StopTokenId(id))) => format!("token {id}"),
        (FinishReason::Stop, None) => "the model".into(),
        (FinishReason::Length, None) => "its length".into(),
        (FinishReason::Unspecified, None) => "an unknown reason".into(),
    }
}

fn ms(ms: f64) -> String {
    if ms >= 10_000.0 {
        format!("{:.1} s", ms / 1e3)
    } else {
        format!("{ms:.1} ms")
    }
}

fn count(n: u32, thing: &str) -> String {
    if n == 1 {
        format!("1 {thing}")
    } else {
        format!("{n} {thing}s")
    }
}

/// The whole answer as one JSON object, for `--json`.
pub(crate) fn json(request_id: &str, seed: u64, text: &str, ids: &[u32], finished: &Finished) -> Value {
    let usage = finished.usage.unwrap_or_default();
    let time = finished.timings.unwrap_or_default();
    let served = finished.served.clone().unwrap_or_default();
    json!({
        "request_id": request_id,
        "seed": seed,
        "text": text,
        "ids": ids,
        "reason": finished.reason().as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase(),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "timings": {
            "queue_ms": time.queue_ms,
            "prefill_ms": time.prefill_ms,
            "transfer_ms": time.transfer_ms,
            "first_step_ms": time.first_step_ms,
            "ttft_ms": time.ttft_ms,
            "total_ms": time.total_ms,
            "tokens_per_s": tokens_per_s(finished),
        },
        "served": {
            "router": served.router,
            "prefill_node": served.prefill_node,
            "decode_node": served.decode_node,
            "kv_bytes": served.kv_bytes,
            "kv_blocks": served.kv_blocks,
            "attempts": served.attempts,
            "transport": served.transport,
        },
    })
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{Served, Timings, Usage};

    use super::*;

    fn finished() -> Finished {
        Finished {
            choice: 0,
            reason: FinishReason::Stop.into(),
            matched: Some(Matched::StopTokenId(2)),
            usage: Some(Usage {
                prompt_tokens: 70,
                completion_tokens: 101,
                cached_tokens: 32,
            }),
            timings: Some(Timings {
                queue_ms: 0.4,
                prefill_ms: 40.0,
                transfer_ms: 3.2,
                first_step_ms: 9.0,
                ttft_ms: 50.0,
                total_ms: 1_050.0,
            }),
            served: Some(Served {
                router: "router-0".into(),
                prefill_node: "prefill-0".into(),
                decode_node: "decode-1".into(),
                kv_bytes: 1_638_400,
                kv_blocks: 3,
                attempts: 1,
                transport: "grpc".into(),
            }),
        }
    }

    fn check(table: &str, expected: &[&str]) {
        for text in expected {
            assert!(table.contains(text), "{text:?} is not in:\n{table}");
        }
    }

    #[test]
    fn a_handed_over_answer_shows_what_crossed() {
        let table = table(&finished());
        check(
            &table,
            &[
                "70 prompt tokens, 32 of them cached",
                "prefill-0 → decode-1",
                "3 KV blocks, 1.6 MiB by grpc",
                "99 more tokens, 10.0 ms each",
                "100.0 tokens/s",
                "ended by token 2",
            ],
        );
        assert_eq!(table.lines().count(), 6);
    }

    #[test]
    fn a_local_answer_has_no_transfer() {
        let mut finished = finished();
        let served = finished.served.as_mut().expect("set");
        (served.prefill_node, served.kv_bytes, served.kv_blocks) = (String::new(), 0, 0);
        let table = table(&finished);
        assert!(!table.contains("transfer") && !table.contains("KV block"), "{table}");
        check(&table, &["decode-1"]);
    }

    #[test]
    fn one_token_has_no_speed() {
        let mut finished = finished();
        finished.usage.as_mut().expect("set").completion_tokens = 1;
        finished.served.as_mut().expect("set").decode_node.clear();
        let table = table(&finished);
        assert!(!table.contains("tokens/s") && !table.contains("decode "), "{table}");
        check(&table, &["1 token: first"]);
        assert_eq!(json("r", 1, "", &[], &finished)["timings"]["tokens_per_s"], Value::Null);
    }

    #[test]
    fn json_has_it_all() {
        let value = json("00ff", 7, "Hello", &[1, 2], &finished());
        assert_eq!(value["served"]["kv_blocks"], 3);
        assert_eq!(value["reason"], "stop");
        assert_eq!(value["usage"]["cached_tokens"], 32);
        assert_eq!(value["timings"]["tokens_per_s"], 100.0);
    }
}
