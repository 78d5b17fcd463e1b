//! `drover events`: what happened, and what happens.

use super::{Context, fetch};
use crate::{
    arguments::Events,
    client::Client,
    failure::{Failure, is_elsewhere},
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
    /// Highest revision of the events shown.
    revision: i64,
    /// Those of that revision: a stream may break between events that were written together.
    shown: Vec<Event>,
    /// Until when a stream that broke is taken up again; none while one is open, or before the first one.
    resume_until: Option<Instant>,
    /// A stream was open once: from then on a break is waited out.
    opened: bool,
}

impl Position {
    /// Where a stream is taken up: what has the last revision comes once more.
    fn after_revision(&self) -> i64 {
        (self.revision - 1).max(0)
    }

    /// False for an event that was shown before the stream broke.
    fn is_new(&mut self, event: &Event) -> bool {
        if event.revision > self.revision {
            self.revision = event.revision;
            self.shown.clear();
        }
        if event.revision == self.revision {
            if self.shown.contains(event) {
                return false;
            }
            self.shown.push(event.clone());
        }
        true
    }
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
        let (Failure::Unreachable(why) | Failure::Unavailable(why)) = &failure else { return Err(failure) };
        let now = Instant::now();
        let until = *position.resume_until.get_or_insert(now + RESUME_TIMEOUT);
        if !options.follow || !position.opened || now >= until {
            return Err(failure);
        }
        context.output.verbose(&format!("{why}; trying again"));
        tokio::time::sleep(RESUME_INTERVAL).await;
    }
}

async fn watch(context: &Context, client: &Client, options: &Events, position: &mut Position) -> Result<(), Failure> {
    let request = WatchEventsRequest {
        object: options.object.clone().unwrap_or_default(),
        after_revision: position.after_revision(),
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
                if position.is_new(&event) {
                    show(context, &event)?;
                }
            }
            // Also one that shuts down in order: the next one goes on.
            Err(status) if is_elsewhere(&status) => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_broke_between_events_of_one_revision_leaves_none_out_and_shows_none_twice() {
        let event = |revision, message: &str| Event { revision, message: message.to_owned(), ..Event::default() };
        let mut position = Position::default();
        assert_eq!(position.after_revision(), 0);
        assert!(position.is_new(&event(4, "a")) && position.is_new(&event(7, "b")) && position.is_new(&event(7, "c")));
        assert_eq!(position.after_revision(), 6);
        let taken_up = [event(7, "b"), event(7, "c"), event(7, "d"), event(9, "b")];
        assert_eq!(taken_up.map(|event| position.is_new(&event)), [false, false, true, true]);
        assert!(position.is_new(&event(8, "late")) && position.after_revision() == 8);
    }
}
