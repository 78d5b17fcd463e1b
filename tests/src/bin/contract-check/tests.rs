//! Every kind of break is refused; what old peers do not notice is accepted.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::compare::breaks;
use crate::history::{Contract, Repository};
use crate::{Arguments, check};

const HEAD: &str = "syntax = \"proto3\"; package drover.v1;\n";

const OLD: &str = "
    message Job {
      reserved 9, 20 to 30;
      reserved \"gone\";
      string name = 1;
      optional int32 count = 2;
      repeated string tags = 3;
      oneof source { string path = 4; string url = 5; }
      map<string, int32> limits = 6;
      Inner inner = 7;
      int32 plain = 8;
      message Inner { State state = 1; }
    }
    enum State { STATE_UNSPECIFIED = 0; STATE_READY = 1; STATE_DONE = 2; }
    message Other { string name = 1; }
    service Jobs {
      rpc Get(Job) returns (Other);
      rpc Watch(Job) returns (stream Other);
    }
";

fn contract(body: &str) -> Contract {
    Contract(BTreeMap::from([("drover/v1/job.proto".to_owned(), format!("{HEAD}{body}"))]))
}

/// The breaks of `OLD` with one piece of its text replaced.
fn after(piece: &str, replacement: &str) -> Vec<String> {
    assert_eq!(OLD.matches(piece).count(), 1, "'{piece}' is one place of the contract");
    let new = contract(&OLD.replacen(piece, replacement, 1)).compile().unwrap();
    breaks(&contract(OLD).compile().unwrap(), &new).iter().map(ToString::to_string).collect()
}

#[track_caller]
fn refused(piece: &str, replacement: &str, because: &str) {
    let found = after(piece, replacement);
    assert!(found.iter().any(|one| one.contains(because)), "wanted '{because}' among {found:?}");
}

#[track_caller]
fn accepted(piece: &str, replacement: &str) {
    assert_eq!(after(piece, replacement), Vec::<String>::new());
}

#[test]
fn an_unchanged_contract_is_accepted() {
    accepted("string name = 1;\n      optional", "string name = 1;\n\n      optional");
}

#[test]
fn additions_are_accepted() {
    accepted(
        "string name = 1;\n      optional",
        "string name = 1; bytes more = 10; optional string most = 11;\n      optional",
    );
    accepted("string url = 5;", "string url = 5; string hub = 12;");
    accepted("STATE_DONE = 2;", "STATE_DONE = 2; STATE_LOST = 3;");
    accepted(
        "service Jobs {",
        "message New {} enum Kind { KIND_UNSPECIFIED = 0; } service Jobs { rpc List(New) returns (New);",
    );
    accepted("int32 plain = 8;", "int32 plain = 8 [deprecated = true];");
    accepted("reserved 9, 20 to 30;", "reserved 9, 20 to 40;");
}

#[test]
fn a_removed_field_is_refused_even_when_reserved() {
    refused("int32 plain = 8;", "", "drover.v1.Job.plain: field removed");
    refused("int32 plain = 8;", "reserved 8; reserved \"plain\";", "drover.v1.Job.plain: field removed");
}

#[test]
fn a_renumbered_field_is_refused() {
    refused("int32 plain = 8;", "int32 plain = 18;", "drover.v1.Job.plain: number changed from 8 to 18");
}

#[test]
fn a_renamed_field_is_refused() {
    refused("int32 plain = 8;", "int32 simple = 8;", "drover.v1.Job.plain: name changed from plain to simple");
    refused("int32 plain = 8;", "int32 plain = 8 [json_name = \"p\"];", "JSON name changed from plain to p");
}

#[test]
fn a_retyped_field_is_refused() {
    refused("int32 plain = 8;", "int64 plain = 8;", "drover.v1.Job.plain: type changed from int32 to int64");
    refused("Inner inner = 7;", "Other inner = 7;", "type changed from drover.v1.Job.Inner to drover.v1.Other");
    refused("map<string, int32>", "map<string, int64>", "drover.v1.Job.LimitsEntry.value: type changed");
}

#[test]
fn a_changed_label_or_presence_is_refused() {
    refused("repeated string tags = 3;", "string tags = 3;", "label changed from repeated to singular");
    refused("int32 plain = 8;", "repeated int32 plain = 8;", "label changed from singular to repeated");
    refused("optional int32 count", "int32 count", "presence changed from explicit (optional) to implicit");
    refused("int32 plain = 8;", "optional int32 plain = 8;", "presence changed from implicit to explicit (optional)");
}

#[test]
fn a_field_moved_into_or_out_of_a_oneof_is_refused() {
    refused("string url = 5; }", "} string url = 5;", "drover.v1.Job.url: oneof changed from source to none");
    refused("int32 plain = 8;", "oneof other { int32 plain = 8; }", "oneof changed from none to other");
    refused("oneof source {", "oneof origin {", "oneof changed from source to origin");
}

#[test]
fn a_reserved_number_or_name_used_again_is_refused() {
    refused("reserved 9, 20 to 30;", "int32 nine = 9;", "uses the number 9, which was reserved");
    refused("reserved 9, 20 to 30;", "reserved 9; int32 last = 30;", "uses the number 30, which was reserved");
    refused("reserved \"gone\";", "int32 gone = 13;", "uses a name that was reserved");
}

#[test]
fn removed_messages_enums_and_services_are_refused() {
    let empty = Contract(BTreeMap::from([("drover/v1/job.proto".to_owned(), HEAD.to_owned())])).compile().unwrap();
    let found: Vec<String> =
        breaks(&contract(OLD).compile().unwrap(), &empty).iter().map(ToString::to_string).collect();
    for wanted in [
        "drover.v1.Job: message removed",
        "drover.v1.Job.Inner: message removed",
        "drover.v1.State: enum removed",
        "drover.v1.Jobs: service removed",
    ] {
        assert!(found.iter().any(|one| one == wanted), "{wanted} among {found:?}");
    }
}

#[test]
fn changed_enum_values_are_refused() {
    refused("STATE_DONE = 2;", "", "drover.v1.State.STATE_DONE: value removed");
    refused("STATE_DONE = 2;", "STATE_DONE = 5;", "drover.v1.State.STATE_DONE: number changed from 2 to 5");
    refused("STATE_DONE = 2;", "STATE_ENDED = 2;", "name changed from STATE_DONE to STATE_ENDED");
}

#[test]
fn changed_methods_are_refused() {
    refused("rpc Get(Job) returns (Other);", "", "drover.v1.Jobs.Get: method removed");
    refused("Get(Job)", "Get(Other)", "request changed from drover.v1.Job to drover.v1.Other");
    refused(
        "Get(Job) returns (Other)",
        "Get(Job) returns (Job)",
        "response changed from drover.v1.Other to drover.v1.Job",
    );
    refused(
        "returns (stream Other)",
        "returns (Other)",
        "response changed from stream drover.v1.Other to drover.v1.Other",
    );
    refused("Watch(Job)", "Watch(stream Job)", "request changed from drover.v1.Job to stream drover.v1.Job");
}

/// A repository with one contract, changed and committed by the test.
struct Clone(tempfile::TempDir);

impl Clone {
    fn new() -> Self {
        let clone = Self(tempfile::tempdir().unwrap());
        clone.git(&["init", "--quiet", "--initial-branch=main"]);
        clone
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
    #[allow(clippy::disallowed_methods, reason = "a scratch repository of the test's own")]
    fn git(&self, arguments: &[&str]) {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"];
        let output = Command::new("git").arg("-C").arg(self.path()).args(identity).args(arguments).output().unwrap();
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    #[allow(clippy::disallowed_methods, reason = "a scratch repository of the test's own")]
    fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    fn job(&self, fields: &str) {
        self.write("proto/drover/v1/job.proto", &format!("{HEAD}message Job {{ {fields} }}"));
    }
    fn commit(&self) {
        self.git(&["add", "-A"]);
        self.git(&["commit", "--quiet", "--allow-empty", "-m", "a state"]);
    }
    fn breaks(&self, against: Option<&str>) -> usize {
        check(&Arguments { against: against.map(str::to_owned), root: self.path().to_owned() }).unwrap()
    }
}

#[test]
fn breaks_count_from_the_commit_that_declares_the_contract_stable() {
    let clone = Clone::new();
    clone.job("int32 first = 1;");
    clone.commit();
    clone.job("int64 first = 1;");
    assert_eq!(clone.breaks(None), 0, "not stable yet");
    assert_eq!(clone.breaks(Some("HEAD")), 1, "unless asked");

    clone.write("proto/contract-since", "");
    assert_eq!(clone.breaks(None), 0, "declared, not committed");
    clone.commit();
    clone.job("int64 first = 1; int32 second = 2;");
    assert_eq!(clone.breaks(None), 0, "an addition");
    clone.commit();
    // The next commit looks harmless beside the last but one; the field was in a commit all the same.
    clone.job("int64 first = 1;");
    assert_eq!(clone.breaks(None), 1, "not committed yet");
    clone.commit();
    assert_eq!(clone.breaks(None), 1, "committed");
    clone.job("int64 first = 1; int32 second = 2; int32 third = 3;");
    assert_eq!(clone.breaks(None), 0, "taken back");
}

#[test]
fn a_shallow_clone_says_what_it_could_not_compare() {
    let clone = Clone::new();
    clone.job("int32 first = 1;");
    clone.write("proto/contract-since", "");
    clone.commit();
    clone.job("int32 first = 1; int32 second = 2;");
    clone.commit();
    let shallow = tempfile::tempdir().unwrap();
    let target = shallow.path().join("clone");
    clone.git(&[
        "clone",
        "--quiet",
        "--depth=1",
        &format!("file://{}", clone.path().display()),
        target.to_str().unwrap(),
    ]);

    let past = Repository::open(&target).unwrap().past().unwrap();
    assert_eq!(past.commits.len(), 1);
    assert!(past.remarks.iter().any(|remark| remark.contains("shallow")), "{:?}", past.remarks);
}

#[test]
fn a_contract_that_does_not_compile_and_an_unknown_commit_are_errors() {
    let clone = Clone::new();
    clone.job("int32 first = 1;");
    clone.commit();
    let unknown = Arguments { against: Some("nowhere".to_owned()), root: clone.path().to_owned() };
    assert!(format!("{:#}", check(&unknown).unwrap_err()).contains("no commit is named 'nowhere'"));
    clone.job("int32 first = ;");
    let broken = Arguments { against: None, root: clone.path().to_owned() };
    assert!(format!("{:#}", check(&broken).unwrap_err()).contains("does not compile"));
}
