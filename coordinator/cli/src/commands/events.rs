//! `drover events`: what happened, and what happens.

use super::{Context, fetch};
use crate::{
    arguments::Events,
    client::Client,
    failure::{Failure, is_transport},
    output::tables,
};
use drover_proto::v1::{Event, WatchEventsRequest};
use std::time::Duration;
use tokio::time::Instant;

/// How long a stream that broke is tried to be taken up again.
const RESUME_TIMEOUT: Duration = Duration::from_secs(30);
const RESUME_INTERVAL: Duration = Duration::from_millis(500);

/// How far a stream of events is.
#[derive(Debug, Default)]
struct Position {
    /// Revision of the last event shown.
    after_revision: i64,
    /// Until when a stream that broke is taken up again; none while one is open, or before the first one.
    resume_until: Option<Instant>,
    /// A stream was open once: from then on a break is waited out.
    opened: bool,
}

/// Prints recorded events, oldest first; with `--follow` goes on, over coordinators that come and go.
pub async fn run(context: &Context, options: &Events) -> Result<(), Failure> {
    let client = context.client()?;
    let mut position = Position::default();
    loop {
        let failure = match watch(context, &client, options, &mut position).await {
            Ok(()) if !options.follow => return Ok(()),
            // A coordinator that ends closes its streams: the next one goes on.
            Ok(()) => Failure::Unreachable("the coordinator ended the stream".to_owned()),
            Err(failure) => failure,
        };
        let Failure::Unreachable(why) = failure else { return Err(failure) };
        let now = Instant::now();
        let until = *position.resume_until.get_or_insert(now + RESUME_TIMEOUT);
        if !options.follow || !position.opened || now >= until {
            return Err(Failure::Unreachable(why));
        }
        context.output.verbose(&format!("{why}; trying again"));
        tokio::time::sleep(RESUME_INTERVAL).await;
    }
}

async fn watch(context: &Context, client: &Client, options: &Events, position: &mut Position) -> Result<(), Failure> {
    let request = WatchEventsRequest {
        object: options.object.clone().unwrap_or_default(),
        after_revision: position.after_revision,
        follow: options.follow,
    };
    let mut stream = client
        .read(|mut fleet| {
            let request = request.clone();
            async move { fleet.watch_events(request).await }
        })
        .await?;
    (position.opened, position.resume_until) = (true, None);
    loop {
        match stream.message().await {
            Ok(None) => return Ok(()),
            Ok(Some(answer)) => {
                let event = answer.event.ok_or_else(|| fetch::empty("WatchEvents"))?;
                position.after_revision = position.after_revision.max(event.revision);
                show(context, &event)?;
            }
            Err(status) if is_transport(&status) => {
                client.forget().await;
                return Err(Failure::of_status(&status));
            }
            Err(status) => return Err(Failure::of_status(&status)),
        }
    }
}

fn show(context: &Context, event: &Event) -> Result<(), Failure> {
    if context.output.is_json() {
        return context.output.json_line(&fetch::json("Event", event)?);
    }
    let (text, tone) = tables::event(event);
    context.output.line(&context.output.paint(&text, tone))
}
