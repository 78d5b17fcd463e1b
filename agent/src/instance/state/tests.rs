//! The table of the instance's states, row by row, and what holds whatever happens.

use super::*;
use proptest::prelude::*;

fn policy() -> Policy {
    Policy::default()
}

/// Nobody else is launched: a turn comes at once.
fn run(events: impl IntoIterator<Item = Event>) -> (State, Vec<Action>) {
    let mut state = State::claimed();
    let mut last = Vec::new();
    for event in events {
        (state, last) = state.step(event, 1_000, &policy(), 200);
        if last == [Action::Queue] {
            (state, last) = state.step(Event::Turn, 1_000, &policy(), 200);
        }
    }
    (state, last)
}

fn failing() -> Event {
    Event::Probed(Health::Failing("no answer within 2 s".to_owned()))
}

fn ok() -> Event {
    Event::Probed(Health::Ok)
}

fn exit(code: i32) -> Event {
    Event::Ended(Ended { code: Some(code), last_lines: "the last line".to_owned(), ..Ended::default() })
}

fn refused() -> Event {
    let cause = Cause::Refused;
    Event::Ended(Ended { code: Some(1), last_lines: "the last line".to_owned(), cause, ..Ended::default() })
}

#[test]
fn a_start_goes_through_its_phases() {
    let (state, actions) = run([Event::Begin]);
    assert_eq!((state.phase, actions), (Phase::Starting, vec![Action::Launch]));
    let (state, _) = run([Event::Begin, Event::Launched]);
    assert_eq!(state.phase, Phase::Loading);
    let (state, _) = run([Event::Begin, Event::Launched, Event::Probed(Health::Loading), failing()]);
    assert_eq!(state.phase, Phase::Loading, "slowness of a loading server is no failure");
    let (state, actions) = run([Event::Begin, Event::Launched, ok()]);
    assert_eq!((state.phase, actions), (Phase::Ready, vec![Action::Open]));
}

#[test]
fn who_waits_for_its_turn_can_be_stopped_and_claimed_again() {
    let policy = policy();
    let (queued, actions) = State::claimed().step(Event::Begin, 0, &policy, 0);
    assert_eq!((queued.phase, queued.process, actions), (Phase::Queued, Process::None, vec![Action::Queue]));
    assert!(queued.message.contains("launches_at_once"), "{}", queued.message);
    let (stopped, actions) = queued.clone().step(Event::Want(false), 0, &policy, 0);
    assert_eq!((stopped.phase, actions), (Phase::Stopped, vec![]));
    let (late, actions) = stopped.step(Event::Turn, 0, &policy, 0);
    assert_eq!((late.phase, actions), (Phase::Stopped, vec![]), "a turn that comes too late launches nothing");
    let (still, actions) = queued.step(Event::ClaimedAgain, 0, &policy, 0);
    assert_eq!((still.phase, actions), (Phase::Queued, vec![]));
    let (starting, actions) = still.step(Event::Turn, 0, &policy, 0);
    assert_eq!((starting.phase, starting.message.as_str(), actions), (Phase::Starting, "", vec![Action::Launch]));
    // A restart waits for its turn as a first start does.
    let ended = State::ended(Ended::default(), 0, 0);
    assert_eq!(ended.step(Event::Tick, 0, &policy, 0).1, [Action::Queue]);
}

#[test]
fn traffic_leaves_after_two_failures_and_returns_after_three_successes() {
    let ready = [Event::Begin, Event::Launched, ok()];
    let with = |more: &[Event]| run(ready.iter().chain(more).cloned());
    assert_eq!(with(&[failing(), ok(), failing()]).0.phase, Phase::Ready);
    let (state, actions) = with(&[failing(), failing()]);
    assert_eq!((state.phase, actions), (Phase::Suspect, vec![Action::Close]));
    assert!(state.message.contains("no answer within 2 s"));
    assert_eq!(with(&[failing(), failing(), ok(), ok(), failing(), ok(), ok()]).0.phase, Phase::Suspect);
    let (state, actions) = with(&[failing(), failing(), ok(), ok(), ok()]);
    assert_eq!((state.phase, actions, state.message.as_str()), (Phase::Ready, vec![Action::Open], ""));
}

#[test]
fn a_stop_drains_first_then_asks_then_kills() {
    let state = run([Event::Begin, Event::Launched, ok()]).0;
    let policy = policy();
    let (state, actions) = state.step(Event::Want(false), 0, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Draining, vec![Action::Close, Action::Drain(policy.drain_ms)]));
    let (state, actions) = state.step(Event::Drained, 10, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Stopping, vec![Action::Terminate]));
    let (state, actions) = state.step(Event::Tick, 9 + policy.grace_ms, &policy, 0);
    assert_eq!(actions, []);
    let (state, actions) = state.step(Event::Tick, 10 + policy.grace_ms, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Stopping, vec![Action::Kill]));
    let (state, _) = state.step(exit(0), 20, &policy, 0);
    assert_eq!(state.phase, Phase::Stopped);
}

#[test]
fn force_ends_the_wait_for_requests_and_shortens_the_grace() {
    let policy = policy();
    assert!(policy.grace_ms > 2_000);
    let ready = run([Event::Begin, Event::Launched, ok()]).0;
    let (state, actions) = ready.clone().step(Event::Force, 100, &policy, 0);
    assert_eq!((state.wanted, state.phase, actions), (false, Phase::Stopping, vec![Action::Close, Action::Terminate]));
    assert_eq!(state.deadline_ms, Some(2_100));
    // Draining already: its requests are waited for no more.
    let draining = ready.step(Event::Want(false), 0, &policy, 0).0;
    let (state, actions) = draining.clone().step(Event::Force, 100, &policy, 0);
    assert_eq!((state.phase, actions, state.deadline_ms), (Phase::Stopping, vec![Action::Terminate], Some(2_100)));
    // Asked to end already: not asked again, which llama-server would take for "at once"; killed sooner, and never later.
    let stopping = draining.step(Event::Drained, 10, &policy, 0).0;
    let (state, actions) = stopping.step(Event::Force, 100, &policy, 0);
    assert_eq!((actions, state.deadline_ms), (vec![], Some(2_100)));
    let (state, _) = state.step(Event::Force, 1_000, &policy, 0);
    assert_eq!(state.deadline_ms, Some(2_100));
    assert_eq!(state.step(Event::Tick, 2_100, &policy, 0).1, [Action::Kill]);
    // What is being launched is ended as soon as it is there.
    let (state, _) = run([Event::Begin, Event::Force]);
    let (state, actions) = state.step(Event::Launched, 500, &policy, 0);
    assert_eq!((actions, state.deadline_ms), (vec![Action::Terminate], Some(2_500)));
    // And what has nothing to end has stopped.
    let (state, actions) = run([Event::Begin, Event::Launched, exit(3), Event::Force]);
    assert_eq!((state.phase, actions), (Phase::Stopped, vec![]));
}

#[test]
fn a_server_of_another_model_gets_no_requests_and_is_not_ended() {
    let other = || Event::Probed(Health::Other("the server serves b, not a".to_owned()));
    let (mut state, actions) = run([Event::Begin, Event::Launched, other()]);
    assert_eq!((state.phase, state.deadline_ms, actions), (Phase::Suspect, None, vec![]));
    assert!(state.message.contains("serves b, not a"));
    let mut now = 1_000;
    for event in [ok(), ok(), other(), Event::Tick, ok(), ok()] {
        now += policy().load_timeout_ms;
        let (next, actions) = state.step(event, now, &policy(), 0);
        assert_eq!((next.phase, actions), (Phase::Suspect, vec![]));
        state = next;
    }
    let (state, actions) = state.step(ok(), now, &policy(), 0);
    assert_eq!((state.phase, actions), (Phase::Ready, vec![Action::Open]));
}

#[test]
fn the_attempt_and_the_next_try_are_told() {
    let (state, _) = run([Event::Begin, Event::Launched, exit(3)]);
    assert_eq!(
        state.message,
        "llama-server exited with code 3; its log ends with: the last line; it is started again in 500 ms \
         (attempt 2; 5 quick ends are a crash loop)"
    );
    let failed = || Event::LaunchFailed { message: "no disk".to_owned(), retry: true };
    let (state, _) = run([Event::Begin, failed()]);
    let (state, _) = state.step(Event::Tick, 5_000, &policy(), 200);
    let (state, _) = state.step(Event::Turn, 5_000, &policy(), 200);
    let (state, _) = state.step(failed(), 5_000, &policy(), 200);
    assert_eq!(state.message, "no disk; it is started again in 1000 ms (attempt 3)");
}

#[test]
fn a_stop_wins_over_a_start_in_flight() {
    let (state, actions) = run([Event::Begin, Event::Want(false)]);
    assert_eq!((state.phase, state.process, actions), (Phase::Stopping, Process::Launching, vec![]));
    let (state, actions) = run([Event::Begin, Event::Want(false), Event::Launched]);
    assert_eq!((state.phase, actions), (Phase::Stopping, vec![Action::Terminate]));
    let failed = Event::LaunchFailed { message: "no".to_owned(), retry: true };
    assert_eq!(run([Event::Begin, Event::Want(false), failed]).0.phase, Phase::Stopped);
}

#[test]
fn a_stop_is_final_until_it_is_claimed_again() {
    let stopped = || [Event::Begin, Event::Launched, Event::Want(false), exit(0)];
    let then = |more: &[Event]| run(stopped().into_iter().chain(more.iter().cloned()));
    let (state, actions) = then(&[Event::Want(true)]);
    assert_eq!((state.phase, actions), (Phase::Stopped, vec![]), "its claim may be gone already");
    assert_eq!(then(&[Event::ClaimedAgain]).0.phase, Phase::Claimed);
    let (state, actions) = then(&[Event::Want(true), Event::ClaimedAgain, Event::Want(true)]);
    assert_eq!((state.phase, actions), (Phase::Starting, vec![Action::Launch]));
    // Unwanted by then: it is reported under that token too.
    let (state, actions) = then(&[Event::ClaimedAgain, Event::Want(false)]);
    assert_eq!((state.phase, actions), (Phase::Stopped, vec![]));
    // Of one that goes on nothing changes.
    let (state, actions) = run([Event::Begin, Event::Launched, ok(), Event::ClaimedAgain]);
    assert_eq!((state.phase, actions), (Phase::Ready, vec![]));
}

#[test]
fn what_no_claim_covers_is_not_launched_until_one_does() {
    let policy = policy();
    // Its server ends while nobody knows whose it is: it stays where it is, however long that takes.
    let lost = || [Event::Begin, Event::Launched, ok(), Event::Owned(false), exit(0)];
    let (state, _) = run(lost());
    assert_eq!(state.phase, Phase::Backoff);
    let (state, actions) = state.step(Event::Tick, 1_000_000, &policy, 0);
    assert_eq!((state.phase, state.deadline_ms, actions), (Phase::Backoff, None, vec![]));
    let (state, actions) = state.step(Event::Owned(true), 1_000_000, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Queued, vec![Action::Queue]));
    // Its turn comes when it is nobody's once more.
    let (state, _) = state.step(Event::Owned(false), 1_000_000, &policy, 0);
    let (state, actions) = state.step(Event::Turn, 1_000_000, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Backoff, vec![]));
    assert_eq!(state.step(Event::Owned(true), 1_000_000, &policy, 0).1, [Action::Queue]);
    // Claimed again before its pause was over: that goes on.
    let (state, actions) = run(lost().into_iter().chain([Event::Owned(true)]));
    assert_eq!((state.phase, actions), (Phase::Backoff, vec![]));
    assert_eq!(state.step(Event::Tick, 1_000_000, &policy, 0).1, [Action::Queue]);
    // Claimed, and gone before it began.
    let (state, actions) = run([Event::Owned(false), Event::Begin, Event::Want(true)]);
    assert_eq!((state.phase, actions), (Phase::Claimed, vec![]));
    assert_eq!(state.step(Event::Owned(true), 0, &policy, 0).1, [Action::Queue]);
    // One that an earlier agent has started is nobody's until the claims are known.
    let (state, _) = State::adopted(true, 0, 0, &policy).step(exit(0), 0, &policy, 0);
    assert_eq!(state.step(Event::Tick, 1_000_000, &policy, 0).1, []);
    // A server that serves goes on, and one that is unwanted ends, whoever owns it.
    let (state, actions) = run([Event::Begin, Event::Launched, ok(), Event::Owned(false)]);
    assert_eq!((state.phase, actions), (Phase::Ready, vec![]));
    assert_eq!(state.step(Event::Want(false), 0, &policy, 0).0.phase, Phase::Draining);
}

#[test]
fn a_model_that_can_not_be_loaded_fails_with_the_last_line_and_is_not_tried_again() {
    let (state, _) = run([Event::Begin, Event::Launched, refused()]);
    assert_eq!((state.phase, state.deadline_ms), (Phase::Failed, None));
    assert!(state.message.contains("exited with code 1") && state.message.contains("the last line"));
    let killed = Event::Ended(Ended { signal: Some(9), ..Ended::default() });
    assert_eq!(
        run([Event::Begin, Event::Launched, killed]).0.phase,
        Phase::Backoff,
        "a kill says nothing of the model"
    );
}

#[test]
fn only_its_own_report_of_a_bad_model_or_argument_makes_a_loading_server_fail_for_good() {
    for code in [0, 1, 2, 125, 134, 137, 139, 255] {
        assert_eq!(run([Event::Begin, Event::Launched, exit(code)]).0.phase, Phase::Backoff, "exit code {code}");
    }
    assert_eq!(run([Event::Begin, Event::Launched, refused()]).0.phase, Phase::Failed);
    assert_eq!(run([Event::Begin, Event::Launched, ok(), refused()]).0.phase, Phase::Backoff, "it has served already");
}

#[test]
fn restarts_back_off_and_a_crash_loop_ends() {
    let policy = policy();
    let mut state = run([Event::Begin, Event::Launched, ok()]).0;
    let mut now = 1_000;
    let mut pauses = Vec::new();
    loop {
        now += 100;
        state = state.step(exit(0), now, &policy, 200).0;
        let Some(due) = state.deadline_ms else { break };
        pauses.push(due - now);
        assert_eq!(state.clone().step(Event::Tick, due - 1, &policy, 200).1, []);
        now = due;
        for event in [Event::Tick, Event::Turn, Event::Launched, ok()] {
            state = state.step(event, now, &policy, 200).0;
        }
        assert_eq!(state.phase, Phase::Ready);
    }
    assert_eq!(pauses, [500, 1000, 2000, 4000]);
    assert_eq!((state.phase, state.restarts), (Phase::Failed, 4));
    assert!(state.message.contains("crash loop: ended 5 times"), "{}", state.message);
}

#[test]
fn stable_running_forgives() {
    let policy = policy();
    let mut state = run([Event::Begin, Event::Launched, ok()]).0;
    let mut now = 1_000;
    for _ in 0..10 {
        now += policy.stable_ms;
        state = state.step(exit(0), now, &policy, 200).0;
        assert_eq!(state.deadline_ms, Some(now + 500));
        now += 500;
        for event in [Event::Tick, Event::Turn, Event::Launched, ok()] {
            state = state.step(event, now, &policy, 200).0;
        }
    }
    assert_eq!((state.phase, state.restarts), (Phase::Ready, 10));
}

#[test]
fn loading_fails_only_for_lack_of_progress() {
    let policy = policy();
    let state = run([Event::Begin, Event::Launched]).0;
    let late = 1_000 + policy.load_timeout_ms;
    let (state, _) = state.step(Event::Progress, late - 1, &policy, 0);
    let (state, actions) = state.step(Event::Tick, late, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Loading, vec![]));
    let due = late - 1 + policy.load_timeout_ms;
    let (state, actions) = state.step(Event::Tick, due, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Loading, vec![Action::Look]));
    let (state, actions) = state.step(looked(due, false, Health::Loading), due + 1_001, &policy, 0);
    assert_eq!((state.phase, actions), (Phase::Stopping, vec![Action::Terminate]));
    let (state, _) = state.step(exit(0), late, &policy, 0);
    assert_eq!(state.phase, Phase::Backoff);
    assert!(state.message.contains("no progress for 300 s"), "{}", state.message);
}

fn looked(begun_ms: u64, progress: bool, health: Health) -> Event {
    Event::Looked { begun_ms, progress, health }
}

/// As after a halt of the agent, in which the server has loaded on: the time is over before anything was heard of it.
#[test]
fn a_load_that_took_too_long_is_looked_at_once_more_before_it_is_ended() {
    let policy = policy();
    let due = 1_000 + policy.load_timeout_ms;
    let loading = run([Event::Begin, Event::Launched]).0;
    let (late, actions) = loading.step(Event::Tick, due + 5, &policy, 0);
    assert_eq!((late.phase, actions), (Phase::Loading, vec![Action::Look]));
    let after = |event: Event, now: u64| {
        let (state, actions) = late.clone().step(event, now, &policy, 0);
        (state.phase, actions, state.deadline_ms)
    };
    assert_eq!(after(looked(due + 5, false, Health::Ok), due + 10).0, Phase::Ready);
    assert_eq!(after(looked(due + 5, true, Health::Loading), due + 10).2, Some(due + 10 + policy.load_timeout_ms));
    assert_eq!(after(Event::Progress, due + 10).2, Some(due + 10 + policy.load_timeout_ms));
    // What was seen before the time was over, or long ago, because the agent was halted again, ends nothing.
    assert_eq!(after(looked(due, false, Health::Loading), due + 10).1, []);
    assert_eq!(after(looked(due + 5, false, Health::Loading), due + 20_000).1, [Action::Look]);
    // A look that is never heard of is asked for again.
    assert_eq!(after(Event::Tick, due + 1_000), (Phase::Loading, vec![], late.deadline_ms));
    assert_eq!(after(Event::Tick, due + 20_000).1, [Action::Look]);
    // What was wanted no more meanwhile is ended once, and a look that comes late changes nothing.
    let (stopping, _) = late.clone().step(Event::Want(false), due + 10, &policy, 0);
    assert_eq!(stopping.step(looked(due + 5, false, Health::Loading), due + 10, &policy, 0).1, []);
}

/// A host in the small: what the machine asks of it, and what happens there of itself.
#[derive(Default)]
struct World {
    queued: bool,
    launching: bool,
    alive: bool,
    asked_to_end: bool,
}

impl World {
    fn hear(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Queue => self.queued = true,
                Action::Launch => {
                    assert!(!self.launching && !self.alive, "a second process beside the first");
                    *self = Self { launching: true, ..Self::default() };
                }
                Action::Terminate | Action::Kill => {
                    assert!(self.alive, "a signal to nobody");
                    self.asked_to_end = true;
                }
                Action::Open | Action::Close | Action::Drain(_) | Action::Look => {}
            }
        }
    }

    /// What happens next; with `faults`, also what should not.
    fn next(&mut self, faults: bool, dice: u64) -> Event {
        let fault = faults && dice.is_multiple_of(5);
        match (self.launching, self.alive) {
            (true, _) => {
                (self.launching, self.alive) = (false, !fault);
                if fault { Event::LaunchFailed { message: "no".to_owned(), retry: true } } else { Event::Launched }
            }
            (false, true) if self.asked_to_end || fault => {
                self.alive = false;
                exit(0)
            }
            (false, true) if dice.is_multiple_of(2) => Event::Drained,
            (false, true) => ok(),
            (false, false) if std::mem::take(&mut self.queued) => Event::Turn,
            (false, false) => Event::Tick,
        }
    }
}

#[test]
fn attempts_that_started_nothing_make_no_end_a_crash_loop() {
    let no = || Event::LaunchFailed { message: "no session now".to_owned(), retry: true };
    let mut state = run([Event::Begin, Event::Turn, Event::Launched, ok(), exit(1)]).0;
    let mut longest = 0;
    // An outage: whatever it needs to be started is away for a while.
    for _ in 0..8 {
        let due = state.deadline_ms.unwrap();
        for event in [Event::Tick, Event::Turn, no()] {
            state = state.step(event, due, &policy(), 200).0;
        }
        assert_eq!(state.phase, Phase::Backoff);
        longest = longest.max(state.deadline_ms.unwrap() - due);
    }
    assert_eq!(longest, 4_000, "the pause has grown, and is bounded");
    let due = state.deadline_ms.unwrap();
    for event in [Event::Tick, Event::Turn, Event::Launched, ok(), exit(1)] {
        state = state.step(event, due, &policy(), 200).0;
    }
    assert_eq!((state.phase, state.quick_ends), (Phase::Backoff, 2), "{}", state.message);
}

#[test]
fn a_thousand_rapid_starts_and_stops_end_as_asked() {
    let policy = Policy { quick_ends_max: u32::MAX, ..policy() };
    for seed in 0..20_u64 {
        let (mut state, mut world, mut now) = (State::claimed(), World::default(), 0);
        let mut dice = seed;
        let mut roll = || {
            // Knuth's linear congruential generator: the same cycles in every run.
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            dice >> 33
        };
        let mut take = |state: &mut State, world: &mut World, event: Event, pause: u64| {
            now += pause;
            let (next, actions) = state.clone().step(event, now, &policy, seed);
            world.hear(&actions);
            *state = next;
        };
        take(&mut state, &mut world, Event::Begin, 0);
        for cycle in 0..1_000 {
            if state.phase == Phase::Stopped {
                take(&mut state, &mut world, Event::ClaimedAgain, 0);
            }
            take(&mut state, &mut world, Event::Want(cycle % 2 == 0), roll() % 50);
            for _ in 0..roll() % 5 {
                let event = world.next(true, roll());
                take(&mut state, &mut world, event, roll() % 2_000);
            }
        }
        for (wanted, phase) in [(false, Phase::Stopped), (true, Phase::Ready), (false, Phase::Stopped)] {
            take(&mut state, &mut world, Event::ClaimedAgain, 0);
            take(&mut state, &mut world, Event::Want(wanted), 0);
            for _ in 0..40 {
                let event = world.next(false, roll());
                take(&mut state, &mut world, event, 40_000);
            }
            assert_eq!((state.phase, world.launching, world.alive), (phase, false, wanted), "seed {seed}");
        }
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Begin),
        any::<bool>().prop_map(Event::Want),
        any::<bool>().prop_map(Event::Owned),
        Just(Event::ClaimedAgain),
        Just(Event::Launched),
        any::<bool>().prop_map(|retry| Event::LaunchFailed { message: "no".to_owned(), retry }),
        Just(ok()),
        Just(failing()),
        Just(Event::Probed(Health::Loading)),
        Just(Event::Progress),
        (any::<bool>(), 0_u64..20_000_000).prop_map(|(progress, begun)| looked(begun, progress, Health::Loading)),
        Just(Event::Force),
        Just(Event::Probed(Health::Other("another model".to_owned()))),
        Just(Event::Drained),
        (0..2).prop_map(exit),
        Just(refused()),
        Just(Event::Ended(Ended { signal: Some(9), ..Ended::default() })),
        Just(Event::Tick),
        Just(Event::Turn),
    ]
}

proptest! {
    #[test]
    fn whatever_happens(
        events in proptest::collection::vec((any_event(), 0_u64..400_000), 0..60),
        seed: u64,
    ) {
        let policy = policy();
        let (mut state, mut now, mut open) = (State::claimed(), 0, false);
        for (event, pause) in events {
            now += pause;
            let before = state.clone();
            let (after, actions) = state.step(event.clone(), now, &policy, seed);
            for action in &actions {
                match action {
                    Action::Queue => prop_assert!(after.wanted),
                    Action::Launch => {
                        prop_assert_eq!(before.process, Process::None, "launched beside a process: {:?}", before);
                        prop_assert!(after.wanted, "launched though unwanted");
                        prop_assert!(after.owned, "launched though no claim covers it");
                        prop_assert!(before.phase != Phase::Stopped, "launched under a token that was given back");
                    }
                    Action::Open => open = true,
                    Action::Close => open = false,
                    Action::Terminate | Action::Kill => {
                        prop_assert!(
                            !(before.wanted && matches!(before.phase, Phase::Ready | Phase::Suspect) && !matches!(event, Event::Want(false) | Event::Force)),
                            "ended a wanted, ready server"
                        );
                        prop_assert_eq!(after.process, Process::Alive);
                    }
                    Action::Drain(_) => prop_assert!(!after.wanted),
                    Action::Look => prop_assert_eq!(after.phase, Phase::Loading),
                }
            }
            prop_assert_eq!(open, after.phase == Phase::Ready, "requests go to {:?}", after.phase);
            prop_assert!(
                (after.process == Process::None)
                    == matches!(
                        after.phase,
                        Phase::Claimed | Phase::Queued | Phase::Backoff | Phase::Failed | Phase::Stopped
                    )
            );
            state = after;
        }
        // A stop always comes to its end, whatever was going on.
        let mut state = state.step(Event::Want(false), now, &policy, seed).0;
        for _ in 0..4 {
            let event = match (state.process, state.phase) {
                (Process::Launching, _) => Event::Launched,
                (Process::Alive, Phase::Draining) => Event::Drained,
                (Process::Alive, _) => exit(0),
                (Process::None, _) => break,
            };
            let (next, actions) = state.step(event, now, &policy, seed);
            prop_assert!(!actions.contains(&Action::Launch));
            state = next;
        }
        prop_assert_eq!(state.phase, Phase::Stopped);
        prop_assert_eq!(state.step(Event::Tick, u64::MAX, &policy, seed).1, vec![]);
    }
}
