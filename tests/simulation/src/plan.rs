//! What happens in a run, as a value made from the seed: printed, it is the first help with a failure.

use crate::{chance::Chance, world::Settings};

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub settings: Settings,
    /// Units of memory of each node.
    pub nodes: Vec<i64>,
    /// Ordered by time, in milliseconds.
    pub steps: Vec<(u64, Step)>,
    /// When all faults end.
    pub chaos_ms: u64,
}

/// Something that is done at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A deployment is to have so many instances; `changed`: of a new revision.
    Apply { name: String, replicas: i32, changed: bool },
    /// A deployment is deleted.
    Delete { name: String },
    /// The links of an agent are cut, all or one, for a time.
    Cut { agent: usize, to: Option<usize>, up: bool, down: bool, ms: u64 },
    /// An agent's stream breaks.
    Reset { agent: usize },
    /// An agent is killed, and started again later.
    KillAgent { agent: usize, ms: u64 },
    /// An agent is stopped and goes on later: all of it, or all but its session.
    PauseAgent { agent: usize, all: bool, ms: u64 },
    /// A host is rebooted.
    Reboot { agent: usize, ms: u64 },
    /// The file of an agent's session is lost, and the agent killed.
    LoseSession { agent: usize, ms: u64 },
    /// An agent claims from now on, and then does nothing.
    DoesNothing { agent: usize },
    /// A server ends.
    ServerEnds { agent: usize },
    /// A coordinator is killed, or told to end, and started again later.
    KillCoordinator { coordinator: usize, kill: bool, ms: u64 },
    /// All of them are, at the same moment.
    KillCoordinators { ms: u64 },
    /// A coordinator is stopped and goes on later.
    PauseCoordinator { coordinator: usize, ms: u64 },
    /// A coordinator can't reach the store for a time.
    CutStore { coordinator: Option<usize>, refused: bool, ms: u64 },
    /// What a coordinator sees of the store lags for a time.
    SlowWatch { coordinator: usize, lag_ms: u64, ms: u64 },
    /// The store's history is compacted.
    Compact,
    /// A copy of the store's content is taken.
    Copy,
    /// All coordinators are ended, the store is set back to the last copy, and they are started again later.
    Restore { ms: u64 },
    /// Leases get their full time again, as after a change of etcd's leader.
    NewEtcdLeader,
}

impl Plan {
    /// The plan of a seed; a calm one has no faults.
    #[must_use]
    pub fn of(seed: u64, calm: bool) -> Self {
        let mut chance = Chance::new(seed, "plan");
        let coordinators = match chance.between(0, 20) {
            0..12 => 2,
            12..17 => 3,
            _ => 1,
        };
        let count = match chance.between(0, 20) {
            0..11 => 3,
            11..16 => 2,
            _ => 4,
        };
        let nodes: Vec<i64> = (0..count).map(|_| if chance.permille(500) { 2 } else { 4 }).collect();
        let settings = Settings {
            seed,
            coordinators,
            ttl_ms: if chance.permille(700) { 4000 } else { 10_000 },
            offer_deadline_ms: *chance.pick(&[2000, 5000, 60_000]).unwrap_or(&5000),
            candidates: usize::try_from(chance.between(1, 4)).unwrap_or(1),
            late_commits: if calm { 0 } else { *chance.pick(&[0, 5, 30]).unwrap_or(&0) },
            bad_calls: if calm { 0 } else { *chance.pick(&[0, 50, 200]).unwrap_or(&0) },
            slow_shims: if calm { 0 } else { 20 },
            beats_apart: Chance::new(seed, "beats").permille(750),
            shuffle: true,
        };
        let chaos_ms = if calm { 15_000 } else { chance.between(40_000, 110_000) };
        let mut steps = Vec::new();
        // All that is asked for fits, so that the end is decidable.
        let room: i64 = nodes.iter().sum::<i64>() * 7 / 10;
        let names: Vec<String> = (0..chance.between(1, 4)).map(|n| format!("m{n}")).collect();
        let most = (room / i64::try_from(names.len()).unwrap_or(1)).clamp(1, 3);
        let replicas = |chance: &mut Chance| i32::try_from(chance.between(1, most.unsigned_abs() + 1)).unwrap_or(1);
        for name in &names {
            let replicas = replicas(&mut chance);
            steps.push((chance.between(500, 3000), Step::Apply { name: name.clone(), replicas, changed: true }));
        }
        if !calm {
            for _ in 0..chance.between(1, 5) {
                let at = chance.between(8000, chaos_ms);
                let Some(name) = chance.pick(&names).cloned() else { continue };
                let changed = chance.permille(300);
                let step = if chance.permille(100) {
                    Step::Delete { name }
                } else {
                    Step::Apply { name, replicas: replicas(&mut chance), changed }
                };
                steps.push((at, step));
            }
            for _ in 0..chance.between(2, 9) {
                steps.push((chance.between(3000, chaos_ms), Step::fault(&mut chance, count, coordinators)));
            }
        }
        // Of a stream of its own: the other steps of a seed are what they were.
        let mut chance = Chance::new(seed, "restore");
        if !calm && chance.permille(120) {
            steps.extend(restores(&mut chance, 5000, chaos_ms));
        }
        let mut plan = Self { settings, nodes, steps, chaos_ms };
        let mut chance = Chance::new(seed, "idle");
        if !calm && chance.permille(60) {
            plan.with_idle_agent(&mut chance);
        }
        plan.steps.sort_by_key(|(at, _)| *at);
        plan
    }

    /// One agent claims and then does nothing, for good. What is asked for fits without it.
    fn with_idle_agent(&mut self, chance: &mut Chance) {
        self.settings.offer_deadline_ms = self.settings.offer_deadline_ms.min(5000);
        self.nodes.iter_mut().for_each(|units| *units = 4);
        for (_, step) in &mut self.steps {
            if let Step::Apply { replicas, .. } = step {
                *replicas = 1;
            }
        }
        let agents = u64::try_from(self.nodes.len()).unwrap_or(1);
        let agent = usize::try_from(chance.between(0, agents)).unwrap_or(0);
        self.steps.push((0, Step::DoesNothing { agent }));
    }
}

/// A restore between two times, in milliseconds; some are done twice, from one copy.
fn restores(chance: &mut Chance, from_ms: u64, until_ms: u64) -> Vec<(u64, Step)> {
    let copied = chance.between(from_ms, until_ms * 3 / 4);
    let mut steps = vec![(copied, Step::Copy)];
    for _ in 0..=u64::from(chance.permille(300)) {
        steps.push((chance.between(copied + 100, until_ms), Step::Restore { ms: chance.spread_ms(50, 15_000) }));
    }
    steps
}

impl Plan {
    /// Of a seed, with what a breakage needs to show itself happening much more often than in a random plan.
    #[must_use]
    pub fn towards(self, what: Towards) -> Self {
        let mut plan = self;
        let mut chance = Chance::new(plan.settings.seed, "towards");
        let (agents, coordinators) = (plan.nodes.len(), plan.settings.coordinators);
        let agent =
            |chance: &mut Chance| usize::try_from(chance.between(0, u64::try_from(agents).unwrap_or(1))).unwrap_or(0);
        plan.settings.offer_deadline_ms = 60_000;
        plan.settings.late_commits = 0;
        plan.settings.bad_calls = 500;
        match what {
            Towards::MovedSessions => {
                for n in 0..120 {
                    plan.steps.push((1000 + n * 300, Step::Reset { agent: agent(&mut chance) }));
                }
            }
            Towards::LateCommits => {
                plan.settings.bad_calls = 0;
                plan.settings.late_commits = 200;
            }
            Towards::HaltedCoordinators => {
                plan.settings.ttl_ms = 4000;
                plan.settings.bad_calls = 0;
                for n in 0..24 {
                    let coordinator = usize::try_from(n).unwrap_or(0) % coordinators;
                    plan.steps.push((3000 + n * 2500, Step::PauseCoordinator { coordinator, ms: 4500 }));
                    let replicas = i32::try_from(chance.between(1, 3)).unwrap_or(1);
                    let apply = Step::Apply { name: "m0".to_owned(), replicas, changed: true };
                    plan.steps.push((2500 + n * 2500 + chance.between(0, 2000), apply));
                }
            }
            Towards::Restores => {
                plan.settings.bad_calls = 0;
                plan.steps.extend(restores(&mut chance, 8000, 30_000));
            }
            Towards::LostSessions => {
                plan.settings.bad_calls = 0;
                for n in 0..12 {
                    let cut = Step::Cut { agent: agent(&mut chance), to: None, up: true, down: true, ms: 15_000 };
                    plan.steps.push((6000 + n * 3000, cut));
                }
            }
            Towards::IdleAgents => {
                plan.settings.bad_calls = 0;
                plan.with_idle_agent(&mut chance);
            }
            Towards::UsedOffers => {
                plan.settings.ttl_ms = 2000;
                plan.settings.candidates = 3;
                for n in 0..40 {
                    let ms = chance.between(2500, 8000);
                    plan.steps.push((1000 + n * 1000, Step::KillAgent { agent: agent(&mut chance), ms }));
                }
            }
        }
        plan.steps.sort_by_key(|(at, _)| *at);
        plan
    }
}

/// What a breakage needs.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Towards {
    /// Calls linger while their session is resumed.
    MovedSessions,
    /// Writes of the leader are answered late, or never.
    LateCommits,
    /// Coordinators are halted with what they were told, and go on later.
    HaltedCoordinators,
    /// The store is set back to a copy.
    Restores,
    /// Nodes lose their sessions, and come back with what runs on them.
    LostSessions,
    /// One agent claims, and then does nothing, for good.
    IdleAgents,
    /// Calls linger while the owner of what they claim is lost.
    UsedOffers,
}

impl Step {
    fn fault(chance: &mut Chance, agents: usize, coordinators: usize) -> Self {
        let pick = |chance: &mut Chance, of: usize| {
            usize::try_from(chance.between(0, u64::try_from(of).unwrap_or(1))).unwrap_or(0)
        };
        let agent = pick(chance, agents);
        let coordinator = pick(chance, coordinators);
        let ms = chance.spread_ms(200, 40_000);
        match chance.between(0, 20) {
            0..4 => {
                let to = chance.permille(300).then_some(coordinator);
                let (up, down) =
                    *chance.pick(&[(true, true), (true, true), (true, false), (false, true)]).unwrap_or(&(true, true));
                Self::Cut { agent, to, up, down, ms }
            }
            4 => Self::Reset { agent },
            5..8 => Self::KillAgent { agent, ms },
            8..10 => Self::PauseAgent { agent, all: chance.permille(500), ms },
            10 => Self::Reboot { agent, ms },
            11 => Self::LoseSession { agent, ms: ms.min(3000) },
            12 => Self::ServerEnds { agent },
            13..15 => Self::KillCoordinator { coordinator, kill: chance.permille(700), ms: ms.min(15_000) },
            15 => Self::KillCoordinators { ms: ms.min(20_000) },
            16 => Self::PauseCoordinator { coordinator, ms },
            17 => Self::CutStore {
                coordinator: chance.permille(700).then_some(coordinator),
                refused: chance.permille(300),
                ms: ms.min(20_000),
            },
            18 => Self::SlowWatch { coordinator, lag_ms: chance.spread_ms(50, 5000), ms },
            _ => {
                if chance.permille(500) {
                    Self::Compact
                } else {
                    Self::NewEtcdLeader
                }
            }
        }
    }
}
