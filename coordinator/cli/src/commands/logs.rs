//! `drover logs`: the log of an instance's llama-server, from the node that owns it.

use super::Context;
use crate::{arguments::Logs, failure::Failure};
use drover_proto::v1::StreamLogsRequest;

/// Prints the last lines and, with `--follow`, new ones as they come. A stream that broke is not begun again by itself:
/// lines have no number, so it could not go on where it was.
pub async fn run(context: &Context, options: &Logs) -> Result<(), Failure> {
    let client = context.client()?;
    let request =
        || StreamLogsRequest { instance: options.instance.clone(), tail_lines: options.tail, follow: options.follow };
    let mut stream = client.read(|mut fleet| async move { fleet.stream_logs(request()).await }).await?;
    while let Some(piece) = stream.message().await.map_err(|status| Failure::of_status(&status))? {
        for line in &piece.lines {
            if context.output.is_json() {
                context.output.json_line(&serde_json::json!({ "instance": options.instance, "line": line }))?;
            } else {
                context.output.line(&line.replace(|c: char| c.is_control() && c != '\t', "\u{fffd}"))?;
            }
        }
    }
    Ok(())
}
