//! PURE. Pages of lists: ordered by key, a page's token is the last key shown.

use drover_proto::{limits, status::invalid_field};
use tonic::Status;

/// Items of a page with their keys, and the token of the next one; empty after the last.
pub(super) type Page<'a, T> = (Vec<(&'a String, T)>, String);

/// Cuts one page out of items ordered by key. Returns the items and the next page's token.
#[allow(clippy::result_large_err)] // tonic's own type
pub(super) fn cut<'a, T>(
    items: impl Iterator<Item = (&'a String, T)>,
    page_size: i32,
    page_token: &str,
) -> Result<Page<'a, T>, Status> {
    let size = match usize::try_from(page_size) {
        Ok(0) => limits::PAGE_SIZE,
        Ok(n) if n <= limits::PAGE_SIZE_MAX => n,
        _ => {
            let what = format!(
                "{page_size} is not allowed: use 1 to {}, or 0 for {}",
                limits::PAGE_SIZE_MAX,
                limits::PAGE_SIZE
            );
            return Err(invalid_field("page_size", what));
        }
    };
    let mut page: Vec<_> = items.skip_while(|(key, _)| key.as_str() <= page_token).take(size + 1).collect();
    let more = page.len() > size;
    page.truncate(size);
    let next = if more { page.last().map(|(key, _)| (*key).clone()).unwrap_or_default() } else { String::new() };
    Ok((page, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn pages_cover_everything_once_and_bad_sizes_are_refused() {
        let items: BTreeMap<String, usize> = (0..25).map(|n| (format!("k{n:02}"), n)).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (page, next) = cut(items.iter(), 10, &token).unwrap();
            seen.extend(page.iter().map(|(_, n)| **n));
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, (0..25).collect::<Vec<_>>());
        assert!(cut(items.iter(), -1, "").is_err());
        assert!(cut(items.iter(), 1001, "").is_err());
    }
}
