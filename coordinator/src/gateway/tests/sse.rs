use super::*;
use proptest::prelude::*;

const STREAM: &str = ": ping\n\ndata: {\"n\":1}\n\nevent: x\ndata: {\"n\":2}\n\ndata: [DONE]\n\n";
const ERROR: &str = r#"{"error":{"message":"broken"}}"#;

/// The data of the events in a text, as a client parses it: an event without its empty line is not seen.
fn data(text: &str) -> Vec<String> {
    let mut events: Vec<&str> = text.split("\n\n").collect();
    assert_eq!(events.pop(), Some(""), "the text ends behind an event: {text:?}");
    let line = |event: &&str| event.lines().find_map(|line| line.strip_prefix("data: ").map(str::to_owned));
    events.iter().filter_map(line).collect()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn wherever_a_stream_breaks_the_error_is_an_event_of_its_own() {
    for cut in 0..=STREAM.len() {
        let mut events = Events::default();
        let mut out = events.push(Bytes::copy_from_slice(&STREAM.as_bytes()[..cut])).pass.to_vec();
        assert_eq!(events.is_complete(), cut == STREAM.len(), "cut at {cut}");
        out.extend_from_slice(&events.break_off(ERROR));
        let data = data(text(&out));
        let (last, before) = data.split_last().unwrap();
        assert_eq!(last, ERROR, "cut at {cut}");
        let whole = ["{\"n\":1}", "{\"n\":2}", "[DONE]"];
        assert_eq!(before, &whole[..before.len()], "cut at {cut}");
    }
}

#[test]
fn an_event_too_large_to_hold_is_ended_before_the_error() {
    let mut events = Events::default();
    let head = events.push(Bytes::from(format!("data: {}", "x".repeat(HELD_BYTES_MAX))));
    assert!(head.progress && head.pass.len() > HELD_BYTES_MAX);
    assert!(!events.is_complete());
    let tail = events.break_off(ERROR);
    assert_eq!(text(&tail), format!("\n\ndata: {ERROR}\n\n"));
    let mut events = Events::default();
    events.push(Bytes::from(format!("data: {}", "x".repeat(HELD_BYTES_MAX))));
    assert_eq!(text(&events.push(Bytes::from_static(b"y\n\n")).pass), "y\n\n");
    assert_eq!(text(&events.break_off(ERROR)), format!("data: {ERROR}\n\n"), "it was ended by itself");
}

#[test]
fn pings_are_no_progress_and_whole_events_are_not_copied() {
    let mut events = Events::default();
    assert_eq!(
        events.push(Bytes::from_static(b": ping\n\n:\n\n")),
        Step { pass: Bytes::from_static(b": ping\n\n:\n\n"), progress: false }
    );
    let chunk = Bytes::from_static(b"data: 1\r\n\r\n");
    let step = events.push(chunk.clone());
    assert!(step.progress);
    assert_eq!(step.pass.as_ptr(), chunk.as_ptr());
}

#[test]
fn an_end_is_complete_only_behind_done_or_an_error() {
    let complete = |stream: &'static str| {
        let mut events = Events::default();
        events.push(Bytes::from_static(stream.as_bytes()));
        events.is_complete()
    };
    assert!(complete("data: {}\n\ndata: [DONE]\n\n"));
    assert!(complete("data: [DONE]\n\n: ping\n\n\n"));
    assert!(complete("data: {\"error\":{\"code\":500}}\n\n"));
    assert!(!complete("data: {\"choices\":[]}\n\n"));
    assert!(!complete("data: [DONE]\n\ndata: {"));
    assert!(!complete(""));
}

proptest! {
    #[test]
    fn whatever_the_pieces_the_bytes_are_the_same(cuts in prop::collection::vec(0..STREAM.len(), 0..8)) {
        let mut cuts = cuts;
        cuts.extend([0, STREAM.len()]);
        cuts.sort_unstable();
        let (mut events, mut out) = (Events::default(), Vec::new());
        for pair in cuts.windows(2) {
            let step = events.push(Bytes::copy_from_slice(&STREAM.as_bytes()[pair[0]..pair[1]]));
            prop_assert!(step.pass.is_empty() || step.pass.ends_with(b"\n\n"));
            out.extend_from_slice(&step.pass);
        }
        prop_assert_eq!(text(&out), STREAM);
        prop_assert!(events.is_complete());
    }
}
