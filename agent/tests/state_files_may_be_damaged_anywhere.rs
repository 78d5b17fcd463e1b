//! State files cut, flipped, zeroed and overwritten at random places: what is read is what was written, or damage that is
//! told, never a third thing; and a server whose files were damaged goes on.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_agent::{
    instance::claim::Claim,
    link::stored::{self, Stored},
};
use drover_proto::v1::{InstanceState, Token};
use drover_shim::{
    durable,
    record::{Directory, Exit, Record, Spec},
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use support::{Node, check::check, wait_for};

const ID: &str = "tiny-234567";
/// Seeds of the damage done to files alone, and to those of a running server.
const SEEDS: u64 = 1_000;
const SEEDS_WITH_A_SERVER: u64 = 8;

/// The same numbers in every run (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % sides as u64).unwrap()
    }
}

/// Damages what was once written; may leave it as it is.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let place = dice.roll(bytes.len());
    let end = place + dice.roll(bytes.len() - place) + 1;
    match dice.roll(5) {
        0 => bytes.truncate(place),
        1 => bytes[place] ^= 1 << dice.roll(8),
        // As after a power cut: the length is there, the content is not.
        2 => bytes[place..end].fill(0),
        3 => bytes[place..end].fill_with(|| u8::try_from(dice.roll(256)).unwrap()),
        _ => bytes.extend_from_within(place..end),
    }
}

/// Damages a file each time anew; returns how often the damage was told, of as many as changed anything.
fn thousand<T: PartialEq + std::fmt::Debug>(path: &Path, read: impl Fn() -> Result<T, durable::Error>) -> (u64, u64) {
    let (good, value) = (fs::read(path).unwrap(), read().unwrap());
    let (mut told, mut changed) = (0, 0);
    for seed in 0..SEEDS {
        let mut bytes = good.clone();
        damage(&mut bytes, &mut Dice(seed));
        fs::write(path, &bytes).unwrap();
        changed += u64::from(bytes != good);
        match read() {
            Ok(found) => assert_eq!(found, value, "seed {seed}: {}", path.display()),
            Err(error) => {
                assert!(error.is_damage(), "seed {seed}: {error}");
                assert!(error.to_string().contains(&path.display().to_string()), "seed {seed}: {error}");
                told += 1;
            }
        }
    }
    fs::write(path, good).unwrap();
    (told, changed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_ways() {
    let node = Node::start().await;
    node.run(ID).await;
    let files = node.directory(ID);
    // Copies: the agent writes to its own.
    let copies = Directory::new(node.path("copies"));
    fs::create_dir(copies.path()).unwrap();
    for name in ["spec", "record", "claim"] {
        fs::copy(files.path().join(name), copies.path().join(name)).unwrap();
    }
    let exit = Exit {
        format: 1,
        process: node.record(ID).process,
        token: node.record(ID).token,
        code: None,
        signal: Some(9),
        exec_error: None,
        ended_at_ms: 1,
        log_lines_dropped: 2,
        oom_killed: Some(false),
        lease_lost: false,
    };
    durable::write(&copies.exit(), &exit).unwrap();
    let session = Stored {
        session_id: "session-5".to_owned(),
        store_generation: 3,
        cluster_id: 7,
        halt_generation: 2,
        store_id: "store-1".to_owned(),
        store_revision: 50,
        next_session_id: "session-6".to_owned(),
    };
    stored::write(copies.path(), &session).unwrap();
    let results = [
        thousand(&copies.spec(), || durable::read::<Spec>(&copies.spec())),
        thousand(&copies.record(), || durable::read::<Record>(&copies.record())),
        thousand(&copies.exit(), || durable::read::<Exit>(&copies.exit())),
        thousand(&copies.path().join("claim"), || Claim::read(copies.path())),
        thousand(&stored::path(copies.path()), || stored::read(copies.path())),
    ];
    for (told, changed) in results {
        assert!(told == changed && changed > SEEDS * 9 / 10, "{told} of {changed} changes were told");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_server_that_runs() {
    let mut node = Node::start().await;
    let mut last = node.run(ID).await;
    for seed in 0..SEEDS_WITH_A_SERVER {
        node.kill_agent();
        let mut dice = Dice(seed);
        let mut damaged = Vec::new();
        for name in
            ["instances/tiny-234567/spec", "instances/tiny-234567/record", "instances/tiny-234567/claim", "session"]
        {
            if dice.roll(2) == 0 {
                continue;
            }
            let path = node.path("state").join(name);
            // A spec that was lost is written anew with the next start only.
            let Ok(mut bytes) = fs::read(&path) else { continue };
            let good = bytes.clone();
            damage(&mut bytes, &mut dice);
            if bytes != good {
                fs::write(&path, bytes).unwrap();
                damaged.push(name);
            }
        }
        let what = format!("seed {seed}, damaged {damaged:?}");
        let (code, report) = check(&node);
        let findings = report["findings"].as_array().unwrap().iter().filter(|finding| finding["severity"] == "damaged");
        let mut named: Vec<_> = findings.map(|finding| PathBuf::from(finding["about"].as_str().unwrap())).collect();
        let mut expected: Vec<_> = damaged.iter().map(|name| node.path("state").join(name)).collect();
        named.sort();
        expected.sort();
        assert_eq!(named, expected, "{what}: {report:#}");
        assert!(code == 1 || damaged.is_empty(), "{what}: {report:#}");
        let before = node.coordinator.state().reports.len();
        node.start_agent().await;
        let report = wait_for(&what, || {
            let state = node.coordinator.state();
            let owned = state.owned.get(ID).and_then(|owned| owned.token);
            state.reports[before..].iter().rfind(|r| r.token == owned).cloned()
        })
        .await;
        assert_eq!((report.state(), report.pid), (InstanceState::Ready, last.pid), "{what}");
        assert!(report.token >= last.token, "{what}: {:?} after {:?}", report.token, last.token);
        assert_eq!(node.processes(ID).len(), 2, "{what}: its shim and itself");
        // As good as new: the next one finds it all.
        let claimed = report.token.map(|Token { generation, revision }| (generation, revision));
        let recorded = node.record(ID).token;
        assert_eq!(Some((recorded.generation, recorded.revision)), claimed, "{what}");
        last = report;
    }
    // What is to run was lost too, more than once, and is known again: it can be started anew.
    support::signal(last.pid, nix::sys::signal::Signal::SIGKILL);
    let again = node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != last.pid).await;
    assert_eq!(again.token, last.token);
}
