//! `drover chat`: one prompt through the gateway, printed as it comes.

use super::Context;
use crate::{arguments::Chat, failure::Failure, gateway::Gateway, output::Output, sse, trace::Trace};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::{io::Read as _, time::Duration};

/// Longest prompt that is read from standard input, in bytes: what the gateway would accept.
const PROMPT_BYTES_MAX: u64 = drover_proto::limits::BODY_BYTES_MAX as u64;

/// Sends the prompt and prints the answer.
pub async fn run(context: &Context, options: &Chat) -> Result<(), Failure> {
    if options.temperature.is_some_and(|t| !t.is_finite() || t < 0.0) {
        return Err(Failure::Input("--temperature takes a number of 0 or more, for example 0.7".to_owned()));
    }
    let gateway = Gateway::new(&context.global.gateway, &context.security()?)?;
    let prompt = prompt(&options.prompt)?;
    let mut request =
        json!({ "model": options.model, "messages": [{ "role": "user", "content": prompt }], "stream": true });
    let optional = [
        ("max_tokens", options.max_tokens.map(Value::from)),
        ("temperature", options.temperature.map(Value::from)),
        ("seed", options.seed.map(Value::from)),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            request[key] = value;
        }
    }
    stream(&context.output, &gateway, &request, Duration::from_secs(options.timeout)).await
}

fn prompt(given: &str) -> Result<String, Failure> {
    if given != "-" {
        return Ok(given.to_owned());
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().take(PROMPT_BYTES_MAX).read_to_string(&mut text);
    read.map_err(|e| Failure::Input(format!("standard input: {e}")))?;
    Ok(text)
}

/// Sends a chat completion with `"stream": true` and prints the tokens as they come (with JSON: each chunk as a line).
/// `idle` is the longest wait for the next piece. A stream that ends without `[DONE]` is a failure.
pub async fn stream(output: &Output, gateway: &Gateway, request: &Value, idle: Duration) -> Result<(), Failure> {
    let trace = Trace::begin();
    output.verbose(&format!("trace {}", trace.id()));
    let mut body = gateway.post("/v1/chat/completions", request, &trace, idle).await?;
    let mut reader = sse::Reader::default();
    let mut answer = Answer::default();
    while !answer.done {
        let frame = tokio::time::timeout(idle, body.frame())
            .await
            .map_err(|_| Failure::Answered(format!("the answer stopped: nothing came for {} s", idle.as_secs())))?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|e| gateway.broken(&e))?;
        let Ok(data) = frame.into_data() else { continue };
        for event in reader.push(&data).map_err(|e| Failure::Answered(e.to_string()))? {
            answer.event(output, &event)?;
        }
    }
    answer.end(output)
}

/// What has come of an answer.
#[derive(Debug, Default)]
struct Answer {
    done: bool,
    /// The last piece did not end its line.
    open_line: bool,
    finish_reason: String,
    timings: Value,
}

impl Answer {
    fn event(&mut self, output: &Output, data: &str) -> Result<(), Failure> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data)
            .map_err(|e| Failure::Answered(format!("a piece of the answer is no JSON: {e}")))?;
        if chunk.get("error").is_some() {
            self.close_line(output)?;
            let text = crate::gateway::error_sentence(http::StatusCode::OK, data.as_bytes());
            let text = text.replace(", HTTP 200)", ")").replace(" (HTTP 200)", "");
            return Err(Failure::Answered(format!("the answer broke off: {text}")));
        }
        if let Some(reason) = chunk["choices"][0]["finish_reason"].as_str() {
            reason.clone_into(&mut self.finish_reason);
        }
        if let Some(timings) = chunk.get("timings") {
            self.timings = timings.clone();
        }
        if output.is_json() {
            return output.json_line(&chunk);
        }
        let delta = &chunk["choices"][0]["delta"];
        for part in ["reasoning_content", "content"] {
            if let Some(text) = delta[part].as_str().filter(|text| !text.is_empty()) {
                self.open_line = !text.ends_with('\n');
                output.raw(&if output.is_terminal() { harmless(text) } else { text.to_owned() })?;
            }
        }
        Ok(())
    }

    fn close_line(&mut self, output: &Output) -> Result<(), Failure> {
        if std::mem::take(&mut self.open_line) { output.raw("\n") } else { Ok(()) }
    }

    fn end(mut self, output: &Output) -> Result<(), Failure> {
        self.close_line(output)?;
        if !self.done {
            return Err(Failure::Answered("the answer broke off: the stream ended before [DONE]".to_owned()));
        }
        if let (Some(tokens), Some(rate)) =
            (self.timings["predicted_n"].as_u64(), self.timings["predicted_per_second"].as_f64())
        {
            output.verbose(&format!("{tokens} tokens, {rate:.1} tokens/s, finish_reason {}", self.finish_reason));
        }
        Ok(())
    }
}

/// A model's words for a terminal: lines and tabs yes, escape sequences no.
fn harmless(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_the_stream_and_a_missing_end_are_failures() {
        let output = Output::default();
        let mut answer = Answer::default();
        let error = answer.event(&output, r#"{"error":{"message":"slot lost","type":"server_error"}}"#).unwrap_err();
        assert_eq!(error, Failure::Answered("the answer broke off: slot lost (server_error)".to_owned()));
        assert!(Answer::default().end(&output).unwrap_err().message().unwrap().contains("before [DONE]"));
        let mut answer = Answer::default();
        answer.event(&output, "[DONE]").unwrap();
        assert!(answer.done && answer.end(&output).is_ok());
    }

    #[test]
    fn a_model_can_not_steer_the_terminal() {
        assert_eq!(harmless("a\u{1b}[2J\tb\nc\r"), "a[2J\tb\nc");
    }
}
