//! The span spool: the lives in it, and what is held or damaged.

use super::report::{Finding, Life, LockReport, Segment, Severity};
use crate::{
    config::View,
    lock::{Holder, holder},
};
use drover_telemetry::{LifeOnDisk, inspect};

pub(super) fn look(view: &View, findings: &mut Vec<Finding>) -> Vec<Life> {
    let root = view.state_dir.join("spool");
    match inspect(&root) {
        Ok(lives) => lives.into_iter().map(|life| judge(life, findings)).collect(),
        Err(error) => {
            let finding = Finding::new(Severity::Damaged, root.display(), format!("it can't be read: {error}"));
            findings.push(
                finding
                    .next_start("spans of earlier lives stay where they are, unreported until they can be read")
                    .way_out("make it readable for the agent's user"),
            );
            Vec::new()
        }
    }
}

fn judge(life: LifeOnDisk, findings: &mut Vec<Finding>) -> Life {
    let lock = holder(&life.file);
    // One that goes on writes at the end of its last segment this moment, perhaps.
    let living = lock != Holder::Nobody;
    let last = life.segments.len().saturating_sub(1);
    let damaged = |at: usize| life.segments[at].torn && !(living && at == last);
    for (at, segment) in life.segments.iter().enumerate().filter(|(at, _)| damaged(*at)) {
        let sound = segment.range.map_or("no sound span is in it".to_owned(), |(first, last)| {
            format!("spans {first} to {last} before that are sound")
        });
        let what = format!("no sound span follows after byte {}; {sound}", segment.sound_bytes);
        let lost = "the sound spans are exported, and the others are declared lost with the reason \"crashed\"";
        let at_once = "the sound spans are exported, and the others are declared lost with the reason \"damaged\"";
        findings.push(
            Finding::new(Severity::Damaged, life.segments[at].path.display(), what)
                .next_start(if living { at_once } else { lost })
                .way_out("nothing: no copy exists; after a killed agent one cut span at the end is to be expected"),
        );
    }
    if let Err(why) = &life.counters {
        let finding = Finding::new(Severity::Damaged, life.file.display(), why.clone());
        findings.push(
            finding
                .next_start("this life counts as never begun, or its spans are exported with an unknown number lost")
                .way_out("nothing: no copy exists"),
        );
    }
    let counters = life.counters.as_ref().ok();
    Life {
        lock: LockReport::from(lock),
        issued: counters.map(|c| c.issued),
        acknowledged: counters.map(|c| c.acknowledged),
        rejected: counters.map(|c| c.rejected),
        given_up: counters.map(|c| c.given_up),
        ended: counters.map(|c| c.ended),
        held: life.segments.iter().map(|s| s.held).sum(),
        segments: (0..life.segments.len())
            .map(|at| {
                let segment = &life.segments[at];
                let (first, last) = (segment.range.map(|r| r.0), segment.range.map(|r| r.1));
                Segment { path: segment.path.clone(), first, last, held: segment.held, damaged: damaged(at) }
            })
            .collect(),
        epoch: life.epoch,
    }
}
