//! `drover-agent check` of a node.

use super::Node;
use serde_json::Value;
use std::{path::Path, process::Command};

/// Exit code and text.
pub fn output(node: &Node, form: &str) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drover-agent"));
    command.arg("check").arg("--state-dir").arg(node.path("state")).arg("--llama-server").arg(&node.program);
    let output = command.args(["--output", form]).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

/// Exit code and report.
pub fn check(node: &Node) -> (i32, Value) {
    let (code, text) = output(node, "json");
    (code, serde_json::from_str(&text).unwrap())
}

/// What a report says about a file.
pub fn finding<'a>(report: &'a Value, path: &Path) -> Option<&'a Value> {
    let about = path.to_str().unwrap();
    report["findings"].as_array().unwrap().iter().find(|finding| finding["about"] == about)
}
