//! Lists in pages: `?limit=` and `?after=`, and a link to the next page (RFC 8288).
//!
//! Who asks for neither gets the whole list in its usual order. A page is in the order of what its entries are called by, so what comes and goes
//! between two pages moves nothing else. The link is relative, so it is right whatever the path is called by those who pass requests on.

use std::fmt::Display;
use std::str::FromStr;

use api::{MAX_PAGE, Problem, ProblemKind};
use hyper::header::{HeaderMap, HeaderValue, LINK};
use hyper::{StatusCode, Uri};
use serde::Serialize;

use crate::routes::{self, Answer};

/// Which part of a list is wanted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Part {
    limit: Option<usize>,
    after: Option<String>,
}

impl Part {
    /// That of a query. What else is in it is passed over, as ever on these paths.
    fn parse(query: &str) -> Result<Self, Problem> {
        let mut part = Self::default();
        for pair in query.split('&') {
            match pair.split_once('=') {
                Some(("limit", value)) => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit));
                    let limit = limit.ok_or_else(|| {
                        let detail = format!("`{value}` is not a number of entries from 1 to {MAX_PAGE}");
                        Problem::new(ProblemKind::Invalid, detail).about("limit")
                    })?;
                    part.limit = Some(limit as usize);
                }
                Some(("after", value)) => part.after = Some(decode(value)?),
                _ => {}
            }
        }
        Ok(part)
    }
}

fn not_an_entry(after: &str) -> Problem {
    Problem::new(
        ProblemKind::Invalid,
        format!("`{after}` is not what an entry is called by"),
    )
    .about("after")
    .remedy("use the `next` link of the page before")
}

/// The part of `all` that `uri` asks for; `key` is what an entry is called by.
pub(crate) fn answer<T, K>(uri: &Uri, mut all: Vec<T>, key: impl Fn(&T) -> K) -> Result<Answer, Problem>
where
    T: Serialize,
    K: Ord + Display + FromStr,
{
    let part = Part::parse(uri.query().unwrap_or_default())?;
    if part == Part::default() {
        return Ok(routes::json(StatusCode::OK, &all));
    }
    all.sort_by_cached_key(&key);
    if let Some(after) = &part.after {
        let after: K = after.parse().map_err(|_| not_an_entry(after))?;
        all.retain(|entry| key(entry) > after);
    }
    let limit = part.limit.unwrap_or(MAX_PAGE as usize);
    let more = all.len() > limit;
    all.truncate(limit);
    let mut answer = routes::json(StatusCode::OK, &all);
    if let Some(last) = all.last().filter(|_| more) {
        let link = format!(
            "<?limit={limit}&after={}>; rel=\"next\"",
            encode(&key(last).to_string())
        );
        if let Ok(link) = HeaderValue::try_from(link) {
            answer.headers_mut().insert(LINK, link);
        }
    }
    Ok(answer)
}

/// The query of the next page, without its question mark.
pub(crate) fn next(headers: &HeaderMap) -> Option<String> {
    let link = headers.get(LINK)?.to_str().ok()?;
    let (query, rest) = link.strip_prefix("<?")?.split_once('>')?;
    rest.contains("rel=\"next\"").then(|| query.to_owned())
}

/// Text as it may stand in a query.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into())
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// The same for a part of a path.
pub(crate) fn encode_whole(text: &str) -> String {
    encode(text).replace('/', "%2F")
}

fn decode(text: &str) -> Result<String, Problem> {
    plain(text).ok_or_else(|| not_an_entry(text))
}

/// Text as it was before it was encoded for a query or a path; none if it is not such a text.
pub(crate) fn plain(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.split_at_checked(2);
        let (digits, behind) = digits?;
        let byte = std::str::from_utf8(digits)
            .ok()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte?);
        rest = behind;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The entries of a page, and the query of the next.
    async fn page(query: &str, all: &[&str]) -> (Vec<String>, Option<String>) {
        let uri: Uri = format!("/v1/vms?{query}").parse().unwrap();
        let answer = answer(&uri, all.to_vec(), |entry| (*entry).to_owned()).unwrap();
        let next = next(answer.headers());
        let body = http_body_util::BodyExt::collect(answer.into_body())
            .await
            .unwrap()
            .to_bytes();
        (serde_json::from_slice(&body).unwrap(), next)
    }

    #[tokio::test]
    async fn pages_are_everything_once_whatever_comes_and_goes() {
        let all = ["d", "b", "a", "c ö/&?"];
        assert_eq!(page("", &all).await, (all.map(str::to_owned).to_vec(), None));
        let (first, next) = page("limit=3", &all).await;
        assert_eq!(first, ["a", "b", "c ö/&?"]);
        let next = next.unwrap();
        assert_eq!(page(&next, &all).await, (vec!["d".to_owned()], None));
        // What the link names has gone, and something has come.
        assert_eq!(page(&next, &["aa", "d", "e"]).await.0, ["d", "e"]);
        assert_eq!(page("after=b", &all).await.0.len(), 2);
        assert_eq!(page("limit=4", &all).await.1, None);
        assert_eq!(page("limit=1&after=z", &all).await, (Vec::new(), None));
        assert_eq!(page("colour=red", &all).await.0.len(), 4);
    }

    #[test]
    fn numbers_are_in_the_order_of_numbers_and_nonsense_is_refused() {
        let ask = |query: &str| {
            let uri: Uri = format!("/?{query}").parse().unwrap();
            answer(&uri, vec![10_u32, 9, 100], |number| *number)
        };
        assert_eq!(
            next(ask("limit=2").unwrap().headers()).unwrap(),
            "limit=2&after=10"
        );
        for query in [
            "limit=0",
            "limit=1001",
            "limit=",
            "limit=x",
            "limit=-1",
            "after=x",
            "after=%4",
            "after=%zz",
            "after=%ff",
        ] {
            assert_eq!(ask(query).err().unwrap().kind, ProblemKind::Invalid, "{query}");
        }
    }
}
