//! Why an instance that nobody has claimed yet finds no owner: what the leader and the nodes said about it last.
//!
//! The leader's reason stands in the deployment's message only where the leader itself answers, and a node that declines
//! an offer says so only as an event. So events are read, at most once a second and only while something is pending.

use crate::{client::Client, commands::fetch};
use drover_proto::v1::{Deployment, Event, Instance, InstanceState, Severity};
use std::time::Duration;
use tokio::time::Instant;

const INTERVAL: Duration = Duration::from_secs(1);
/// Most pending instances that are asked after: what keeps one keeps the others as a rule.
const INSTANCES_MAX: usize = 2;

/// What was found last, and when it was looked for.
#[derive(Debug, Default)]
pub struct Reasons {
    text: String,
    looked_at: Option<Instant>,
}

impl Reasons {
    /// `why` and, while instances are pending, what is known to keep them.
    pub async fn added_to(
        &mut self,
        why: String,
        client: &Client,
        name: &str,
        deployment: &Deployment,
        instances: &[Instance],
    ) -> String {
        let pending: Vec<&str> = instances
            .iter()
            .filter(|i| i.wanted && i.state() == InstanceState::Pending)
            .map(|i| i.id.as_str())
            .take(INSTANCES_MAX)
            .collect();
        if pending.is_empty() {
            return why;
        }
        if self.looked_at.is_none_or(|at| at.elapsed() >= INTERVAL) {
            self.looked_at = Some(Instant::now());
            // Without events the wait knows less, and is no worse for it.
            let found = tokio::time::timeout(INTERVAL, found(client, name, deployment, &pending)).await;
            self.text = found.unwrap_or_default();
        }
        format!("{why}{}", self.text)
    }
}

async fn found(client: &Client, name: &str, deployment: &Deployment, pending: &[&str]) -> String {
    let mut text = String::new();
    let events = fetch::recorded_events(client, &format!("deployment/{name}")).await.unwrap_or_default();
    if let Some(event) = last_warning(&events, deployment) {
        text.push_str(&format!("; {}", event.message));
    }
    for id in pending {
        let events = fetch::recorded_events(client, &format!("instance/{id}")).await.unwrap_or_default();
        if let Some(event) = last_warning(&events, deployment) {
            text.push_str(&format!("; {}: {} ({})", event.source, event.message, event.reason));
        }
    }
    text
}

/// The last warning since the deployment was changed: an older one may have been heeded by that change.
fn last_warning<'a>(events: &'a [Event], deployment: &Deployment) -> Option<&'a Event> {
    let seconds = |time: Option<&prost_types::Timestamp>| time.map_or(0, |t| t.seconds);
    let since = seconds(deployment.updated_at.as_ref());
    let warns = |e: &&Event| matches!(e.severity(), Severity::Warning | Severity::Error);
    events.iter().rev().filter(warns).find(|e| seconds(e.time.as_ref()) >= since && !e.message.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_warning_since_the_last_change_is_a_reason() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let event = |seconds, severity: Severity, message: &str| Event {
            time: at(seconds),
            severity: severity.into(),
            message: message.into(),
            ..Default::default()
        };
        let deployment = Deployment { updated_at: at(10), ..Default::default() };
        let old = [event(9, Severity::Warning, "old")];
        assert_eq!(last_warning(&old, &deployment), None);
        let events = [
            event(10, Severity::Warning, "first"),
            event(11, Severity::Warning, "second"),
            event(12, Severity::Info, "news"),
        ];
        assert_eq!(last_warning(&events, &deployment).unwrap().message, "second");
    }
}
