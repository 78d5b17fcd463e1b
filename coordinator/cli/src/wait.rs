//! Waiting until a deployment is as it was asked for, or is gone.
//!
//! Level-triggered: each round looks at the deployment and its instances as they are now ([`standing`] is pure and
//! decides), so nothing is missed when an event is. Every wait has a deadline.

mod reasons;

use crate::{client::Client, commands::fetch, failure::Failure, output::tables, progress::Progress};
use drover_proto::v1::{Deployment, Instance, InstanceState};
use reasons::Reasons;
use std::time::Duration;
use tokio::time::Instant;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(150);

/// How far a deployment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Exactly what was asked for runs and answers.
    Ready,
    /// Not yet; says what is missing.
    Waiting(String),
    /// It will not become ready by itself; says why.
    Stuck(String),
}

/// How far a deployment is that was asked for as `generation`.
#[must_use]
pub fn standing(generation: u64, deployment: &Deployment, instances: &[Instance]) -> Standing {
    if deployment.deleting {
        return Standing::Stuck("it is being deleted".to_owned());
    }
    if deployment.generation > generation {
        let now = deployment.generation;
        return Standing::Stuck(format!("it was changed meanwhile (generation {generation} is now {now})"));
    }
    let current = |i: &&Instance| i.wanted && i.revision == deployment.revision;
    let failed: Vec<String> =
        instances.iter().filter(current).filter(|i| i.state() == InstanceState::Failed).map(describe).collect();
    if !failed.is_empty() {
        return Standing::Stuck(failed.join("; "));
    }
    let ready = instances.iter().filter(current).filter(|i| i.state() == InstanceState::Ready).count();
    let wanted = usize::try_from(deployment.replicas).unwrap_or(0);
    let old = instances.iter().filter(|i| !current(i) && i.state() != InstanceState::Stopped).count();
    let surplus = old + ready.saturating_sub(wanted);
    if ready == wanted && surplus == 0 {
        return Standing::Ready;
    }
    let mut text = format!("{} of {wanted} ready", ready.min(wanted));
    if surplus > 0 {
        text.push_str(&format!(", {surplus} to be stopped"));
    }
    let others: Vec<String> =
        instances.iter().filter(current).filter(|i| i.state() != InstanceState::Ready).map(describe).collect();
    for part in others.iter().take(3) {
        text.push_str("; ");
        text.push_str(part);
    }
    if others.len() > 3 {
        text.push_str(&format!("; and {} more", others.len() - 3));
    }
    // Instances say more; without any, the deployment's own word is all there is.
    if instances.is_empty() && !deployment.message.is_empty() && !text.contains(&deployment.message) {
        text.push_str(": ");
        text.push_str(&deployment.message);
    }
    Standing::Waiting(text)
}

fn describe(instance: &Instance) -> String {
    let mut text = format!("{} {}", instance.id, tables::state_word(instance.state()));
    if !instance.node.is_empty() {
        text.push_str(&format!(" on {}", instance.node));
    }
    if !instance.message.is_empty() {
        text.push_str(&format!(" ({})", instance.message));
    }
    text
}

/// Waits until the deployment runs as `generation` asked.
pub async fn until_ready(
    client: &Client,
    name: &str,
    generation: u64,
    timeout: Duration,
    progress: &Progress,
) -> Result<Deployment, Failure> {
    let deadline = Instant::now() + timeout;
    let mut reasons = Reasons::default();
    progress.doing(&format!("{name}: waiting until it is ready"));
    loop {
        let why = match look(client, name).await {
            Ok((deployment, instances)) => match standing(generation, &deployment, &instances) {
                Standing::Ready => return Ok(deployment),
                Standing::Stuck(why) => return Err(Failure::Answered(format!("{name} does not become ready: {why}"))),
                Standing::Waiting(why) => {
                    Failure::TimedOut(reasons.added_to(why, client, name, &deployment, &instances).await)
                }
            },
            // A coordinator that is away for a moment is no reason to stop waiting.
            Err(away @ (Failure::Unreachable(_) | Failure::Unavailable(_))) => away,
            Err(other) => return Err(other),
        };
        pause(deadline, why, &format!("{name} was not ready within {} s", timeout.as_secs()), name, progress).await?;
    }
}

/// Waits until the deployment is gone.
pub async fn until_gone(client: &Client, name: &str, timeout: Duration, progress: &Progress) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    progress.doing(&format!("{name}: waiting until it is gone"));
    loop {
        let why = match fetch::deployment(client, name).await {
            Ok(Some(d)) if d.deleting => {
                Failure::TimedOut(format!("{} instances still owned, {}", d.claimed_replicas, or_none(&d.message)))
            }
            // Gone, or created anew by somebody else.
            Ok(_) => return Ok(()),
            Err(away @ (Failure::Unreachable(_) | Failure::Unavailable(_))) => away,
            Err(other) => return Err(other),
        };
        pause(deadline, why, &format!("{name} was not gone within {} s", timeout.as_secs()), name, progress).await?;
    }
}

async fn look(client: &Client, name: &str) -> Result<(Deployment, Vec<Instance>), Failure> {
    let Some(deployment) = fetch::deployment(client, name).await? else {
        return Err(Failure::Answered(format!("{name} does not become ready: it was deleted")));
    };
    Ok((deployment, fetch::instances(client, name, "").await?))
}

/// Shows why it is not done yet, and waits for the next look; past the deadline that reason is the failure.
async fn pause(deadline: Instant, why: Failure, late: &str, name: &str, progress: &Progress) -> Result<(), Failure> {
    if Instant::now() >= deadline {
        let with = |text: String| format!("{late}: {text}");
        return Err(match why {
            Failure::Unreachable(text) => Failure::Unreachable(with(text)),
            Failure::Unavailable(text) => Failure::Unavailable(with(text)),
            Failure::TimedOut(text) => Failure::TimedOut(with(text)),
            other => other,
        });
    }
    progress.doing(&format!("{name}: {}", why.message().unwrap_or_default()));
    tokio::time::sleep_until((Instant::now() + INTERVAL).min(deadline)).await;
    Ok(())
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "no reason given" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, state: InstanceState, revision: u64, wanted: bool) -> Instance {
        Instance { id: id.into(), state: state.into(), revision, wanted, ..Default::default() }
    }

    fn deployment(replicas: i32) -> Deployment {
        Deployment { generation: 2, revision: 2, replicas, ..Default::default() }
    }

    #[test]
    fn ready_means_all_of_this_revision_and_nothing_else_running() {
        let ready = InstanceState::Ready;
        let two = [instance("a", ready, 2, true), instance("b", ready, 2, true)];
        assert_eq!(standing(2, &deployment(2), &two), Standing::Ready);
        assert_eq!(standing(2, &deployment(0), &[]), Standing::Ready);
        let old = [instance("a", ready, 1, true), instance("b", ready, 2, true)];
        assert_eq!(standing(2, &deployment(1), &old), Standing::Waiting("1 of 1 ready, 1 to be stopped".into()));
        let leaving = [instance("a", ready, 2, true), instance("b", InstanceState::Draining, 2, false)];
        assert!(matches!(standing(2, &deployment(1), &leaving), Standing::Waiting(_)));
        let surplus = [instance("a", ready, 2, true), instance("b", ready, 2, true)];
        assert_eq!(standing(2, &deployment(1), &surplus), Standing::Waiting("1 of 1 ready, 1 to be stopped".into()));
        let stopped = [instance("a", ready, 2, true), instance("b", InstanceState::Stopped, 2, false)];
        assert_eq!(standing(2, &deployment(1), &stopped), Standing::Ready);
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut pending = instance("a", InstanceState::Pending, 2, true);
        pending.message = "no node has 9 GiB free".into();
        let text = "0 of 1 ready; a PENDING (no node has 9 GiB free)";
        assert_eq!(standing(2, &deployment(1), &[pending]), Standing::Waiting(text.into()));
        let halted = Deployment { message: "claiming is halted".into(), ..deployment(1) };
        assert_eq!(standing(2, &halted, &[]), Standing::Waiting("0 of 1 ready: claiming is halted".into()));
        let many: Vec<_> = (0..9).map(|n| instance(&format!("i{n}"), InstanceState::Loading, 2, true)).collect();
        let Standing::Waiting(text) = standing(2, &deployment(9), &many) else { panic!("not waiting") };
        assert!(text.ends_with("; and 6 more"), "{text}");
    }

    #[test]
    fn what_can_not_become_ready_ends_the_wait() {
        let mut failed = instance("a", InstanceState::Failed, 2, true);
        (failed.message, failed.node) = ("exit code 1".into(), "n1".into());
        assert_eq!(standing(2, &deployment(1), &[failed]), Standing::Stuck("a FAILED on n1 (exit code 1)".into()));
        let earlier = instance("a", InstanceState::Failed, 1, true);
        assert!(matches!(standing(2, &deployment(1), &[earlier]), Standing::Waiting(_)));
        assert!(matches!(standing(1, &deployment(1), &[]), Standing::Stuck(_)));
        let deleting = Deployment { deleting: true, ..deployment(1) };
        assert!(matches!(standing(2, &deleting, &[]), Standing::Stuck(_)));
    }
}
