//! Rules of the programs broken on purpose, one at a time, and the rule of the checker that must name each.

use crate::{
    plan::{Plan, Towards},
    run::{Options, overtaken, run},
};
use drover_coordinator::invariants::Rule;
use std::{
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Mutants that are tried at the same time.
const THREADS: usize = 2;

/// A breakage.
#[derive(Debug)]
pub struct Mutant {
    /// Its switch.
    pub name: &'static str,
    /// What it breaks.
    pub breaks: &'static str,
    /// The rules of which one must be the first to be broken.
    pub named_by: &'static [Rule],
    /// How it is made to show itself.
    pub by: By,
}

/// How a breakage is made to show itself.
#[derive(Debug, Clone, Copy)]
pub enum By {
    /// By random seeds.
    Seeds,
    /// By random seeds with more of something.
    More(Towards),
    /// By a shim that is overtaken, on a host alone: in a whole fleet its start deadline stops it too.
    Shim,
}

/// All of them.
pub const ALL: &[Mutant] = &[
    Mutant {
        name: "status-without-fence",
        breaks: "status is written without comparing the claim",
        named_by: &[Rule::StaleEffect, Rule::StaleRun],
        by: By::Seeds,
    },
    Mutant {
        name: "claim-without-create-compare",
        breaks: "a claim does not compare that there is none",
        named_by: &[Rule::SecondClaim],
        by: By::Seeds,
    },
    Mutant {
        name: "claim-without-session-compare",
        breaks: "a claim does not compare its session",
        named_by: &[Rule::ClaimOfMovedSession, Rule::SessionRewritten, Rule::ClaimNotByTransaction],
        by: By::More(Towards::MovedSessions),
    },
    Mutant {
        name: "claim-without-lease",
        breaks: "a claim hangs on no lease",
        named_by: &[Rule::ClaimWithoutLease],
        by: By::Seeds,
    },
    Mutant {
        name: "claim-by-blind-put",
        breaks: "a claim compares nothing",
        named_by: &[
            Rule::SecondClaim,
            Rule::ClaimOfMovedSession,
            Rule::SessionRewritten,
            Rule::OfferServedTwice,
            Rule::ClaimNotOffered,
            Rule::ClaimNotByTransaction,
        ],
        by: By::Seeds,
    },
    Mutant {
        name: "deadline-from-receive-time",
        breaks: "the agent's deadline runs from the acknowledgement",
        named_by: &[Rule::DeadlineBeyondLease],
        by: By::Seeds,
    },
    Mutant {
        name: "renewal-without-heartbeat",
        breaks: "a coordinator renews by its own clock",
        named_by: &[Rule::RenewedWithoutHeartbeat],
        by: By::Seeds,
    },
    Mutant {
        name: "no-grace-period",
        breaks: "a fresh leader replaces at once",
        named_by: &[Rule::ReplacedInGrace],
        by: By::Seeds,
    },
    Mutant {
        name: "acts-on-unknown-outcome",
        breaks: "a claim without an answer counts as made",
        named_by: &[Rule::AnsweredUnknownClaim],
        by: By::Seeds,
    },
    Mutant {
        name: "shim-ignores-tokens",
        breaks: "a shim starts under a token that was raised",
        named_by: &[Rule::LowerTokenStarted],
        by: By::Shim,
    },
    Mutant {
        name: "drain-before-ready",
        breaks: "a run yields to a claim that is not ready",
        named_by: &[Rule::DrainOrder],
        by: By::Seeds,
    },
    Mutant {
        name: "session-revision-re-read",
        breaks: "a claim compares the session as the coordinator sees it",
        named_by: &[Rule::ClaimOfMovedSession],
        by: By::More(Towards::MovedSessions),
    },
    Mutant {
        name: "resume-without-bump",
        breaks: "a resume does not write the session",
        named_by: &[Rule::ResumedWithoutBump],
        by: By::Seeds,
    },
    Mutant {
        name: "offer-served-twice",
        breaks: "a claim does not compare the last one made",
        named_by: &[Rule::OfferServedTwice],
        by: By::More(Towards::UsedOffers),
    },
    Mutant {
        name: "drain-order-without-token",
        breaks: "an order to drain names no token",
        named_by: &[Rule::DrainOrder],
        by: By::Seeds,
    },
    Mutant {
        name: "session-handed-to-anybody",
        breaks: "a session is handed to an agent without its id",
        named_by: &[Rule::SessionHandedOver],
        by: By::Seeds,
    },
    Mutant {
        name: "nothing-is-given-up",
        breaks: "an agent that claims and then does nothing keeps what it has claimed",
        named_by: &[Rule::EndState],
        by: By::More(Towards::IdleAgents),
    },
    Mutant {
        name: "acting-on-unknown-outcome",
        breaks: "the leader plans on though a write may still take effect",
        named_by: &[Rule::SurplusInstance],
        by: By::More(Towards::LateCommits),
    },
    Mutant {
        name: "offers-before-inventory",
        breaks: "a node is offered instances before it has said what runs there",
        named_by: &[Rule::OfferedBeforeInventory],
        by: By::More(Towards::LostSessions),
    },
    Mutant {
        name: "token-without-generation",
        breaks: "tokens are told without the store's generation",
        named_by: &[Rule::TokenOfOtherGeneration],
        by: By::More(Towards::Restores),
    },
    Mutant {
        name: "generation-stays",
        breaks: "a restore does not raise the generation",
        named_by: &[Rule::RestoredAsItWas],
        by: By::More(Towards::Restores),
    },
    Mutant {
        name: "reports-of-an-older-stream",
        breaks: "what a node has said on an older stream replaces what it has said since",
        named_by: &[Rule::OlderReport],
        by: By::More(Towards::HaltedCoordinators),
    },
];

/// One of them.
#[must_use]
pub fn named(name: &str) -> Option<&'static Mutant> {
    ALL.iter().find(|mutant| mutant.name == name)
}

/// Tries all, or one; each must be caught by a seed which is in order without it.
pub fn all(only: Option<&str>, seeds: u64) -> ExitCode {
    let chosen: Vec<&Mutant> = ALL.iter().filter(|mutant| only.is_none_or(|name| name == mutant.name)).collect();
    let (next, living) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // A mutant is chosen for a thread.
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(mutant) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match caught(mutant, seeds) {
                        Ok(text) => println!("caught   {:<32} {text}", mutant.name),
                        Err(text) => {
                            living.fetch_add(1, Ordering::Relaxed);
                            println!("LIVES    {:<32} {text}", mutant.name);
                        }
                    }
                }
            });
        }
    });
    let (tried, lives) = (chosen.len(), living.into_inner());
    if tried == 0 {
        eprintln!(
            "error: there is no mutant of that name; there are: {}",
            ALL.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")
        );
        return ExitCode::from(2);
    }
    println!("{tried} mutants, {lives} live");
    if lives == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn caught(mutant: &Mutant, seeds: u64) -> Result<String, String> {
    let mut others = Vec::new();
    let plan_of = |seed| match mutant.by {
        By::More(what) => Plan::of(seed, false).towards(what),
        By::Seeds | By::Shim => Plan::of(seed, false),
    };
    let tried = |plan: &Plan, options| {
        if matches!(mutant.by, By::Shim) { overtaken(plan, options) } else { run(plan, options) }
    };
    for seed in 0..seeds {
        let plan = plan_of(seed);
        let outcome = tried(&plan, Options { mutant: Some(mutant.name), ..Options::default() });
        let Some(first) = outcome.violations.first() else { continue };
        if !mutant.named_by.contains(&first.rule) {
            others.push(format!("seed {seed}: {}", first.rule));
            continue;
        }
        if let Some(violation) = tried(&plan, Options::default()).violations.first() {
            others.push(format!("seed {seed} is not in order without it: {}", violation.rule));
            continue;
        }
        return Ok(format!("by seed {seed}: {first} ({})", mutant.breaks));
    }
    others.truncate(5);
    Err(format!("{seeds} seeds did not show that {}; {}", mutant.breaks, others.join("; ")))
}
