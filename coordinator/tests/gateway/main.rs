//! The gateway as clients see it: before it a plain HTTP client, behind it a proxy that serves in the test's process, and
//! behind that stock llama-servers on a tiny model, or stand-ins where a test must decide when an answer breaks. The
//! snapshot is made by hand, so no store and no agent is needed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of a test are no #[test]")]
#![allow(clippy::disallowed_methods, reason = "tests start programs, write files and read clocks")]

mod a_broken_answer_says_so;
mod a_client_that_leaves_frees_its_slot;
mod a_request_that_was_not_executed_is_tried_elsewhere;
mod a_wrong_request_gets_one_clear_error;
mod answers_come_from_real_servers;
mod clients_show_the_secret_where_it_is_demanded;
mod deadlines_end_what_makes_no_progress;
mod logs_come_over_the_proxy;
mod support;
mod the_trace_of_a_request_ends_with_its_answer;
mod the_web_pages_show_the_state;
