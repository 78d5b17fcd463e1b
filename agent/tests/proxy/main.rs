//! The proxy as its agent and its clients see it: a process of its own, driven over its control socket and its port. The
//! llama-servers behind it are stand-ins here that answer what a test needs; real ones are behind the coordinator's tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of a test are no #[test]")]
#![allow(clippy::disallowed_methods, reason = "tests write files and read clocks")]

mod a_draining_instance_finishes_what_it_has;
mod a_request_goes_through_unchanged;
mod an_upgraded_proxy_hands_its_listener_over;
mod logs_are_shown_and_followed;
mod nobody_enters_without_the_secret;
mod support;
mod the_proxy_outlives_the_agent;
mod who_is_gone_without_a_word_is_noticed;
