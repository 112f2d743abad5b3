//! The events of a server: a page of them, or a [stream](crate::sse).

use std::sync::Arc;
use std::time::Duration;

use api::{EventLog, Problem, ProblemKind};
use hyper::header::HeaderMap;
use hyper::{StatusCode, Uri};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::lasting::Lasting;
use crate::routes::{self, Answer};
use crate::sse::{self, Streams};

/// Events of one page.
const PAGE: usize = 256;

/// Longest time that a client may wait for events.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The parameters of a request for events.
#[derive(Debug, Default, PartialEq, Eq)]
struct Query {
    after: u64,
    wait: Duration,
}

impl Query {
    fn lasts(&self) -> bool {
        !self.wait.is_zero()
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let number = || {
                value.parse::<u64>().map_err(|_| {
                    Problem::new(ProblemKind::Invalid, format!("`{value}` is not a whole number")).about(key)
                })
            };
            match key {
                "after" => query.after = number()?,
                "wait" => query.wait = Duration::from_secs(number()?).min(MAX_WAIT),
                _ => {
                    let problem = Problem::new(ProblemKind::Invalid, "there is no such parameter");
                    return Err(problem.about(key).remedy("use after and wait"));
                }
            }
        }
        Ok(query)
    }
}

/// The log of an owner, and those who wait for what comes.
pub(crate) struct Events<S: ?Sized> {
    owner: Arc<S>,
    log: fn(&S) -> &EventLog,
    /// The number of the newest event.
    news: watch::Receiver<u64>,
    streams: Streams,
}

impl<S: ?Sized + Send + Sync + 'static> Events<S> {
    pub(crate) fn new(owner: &Arc<S>, log: fn(&S) -> &EventLog) -> Self {
        let events = log(owner);
        let (told, news) = watch::channel(events.last());
        events.listen(move |sequence| {
            told.send_replace(sequence);
        });
        Self {
            owner: Arc::clone(owner),
            log,
            news,
            streams: Streams::new(),
        }
    }

    /// Answers GET /v1/events. Who waits for a page takes a place of `lasting`.
    pub(crate) async fn answer(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
        lasting: &Lasting,
    ) -> Result<Answer, Problem> {
        let mut query = Query::parse(uri.query().unwrap_or_default())?;
        query.after = sse::last_event_id(headers)?.unwrap_or(query.after);
        let mut news = self.news.clone();
        if sse::is_wanted(headers) {
            let owner = Arc::clone(&self.owner);
            return self.streams.open(owner, self.log, news, query.after);
        }
        let _room = query.lasts().then(|| lasting.room()).transpose()?;
        // Fails when the log is gone or the time is over; the page is right in any case.
        let _ = timeout(query.wait, news.wait_for(|last| *last > query.after)).await;
        let page = (self.log)(&self.owner).page(query.after, PAGE);
        Ok(routes::json(StatusCode::OK, &page))
    }

    /// Has all streams end when they have sent what there is.
    pub(crate) fn end(&self) {
        self.streams.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_and_waits_limited() {
        assert_eq!(Query::parse("").unwrap(), Query::default());
        let query = Query::parse("after=7&wait=5").unwrap();
        assert_eq!((query.after, query.wait), (7, Duration::from_secs(5)));
        assert_eq!(Query::parse("wait=99999").unwrap().wait, MAX_WAIT);
        for text in [
            "after",
            "after=",
            "after=-1",
            "after=x",
            "wait=1.5",
            "limit=1",
            "wait=99999999999999999999",
        ] {
            assert_eq!(
                Query::parse(text).unwrap_err().kind,
                ProblemKind::Invalid,
                "{text}"
            );
        }
    }
}
