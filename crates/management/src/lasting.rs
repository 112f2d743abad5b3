//! Requests that may last, and must not take all there is from those that are answered at once.
//!
//! A merge takes hours, a client may wait for events for a minute. Of such requests there is a certain number at a time, further ones are refused; and
//! fewer still have a helper thread, the others wait for one. So there is always a connection and a thread for who asks how things are.

use std::sync::Arc;
use std::time::Duration;

use api::storage::Operation;
use api::{Problem, ProblemKind, StorageRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::routes;

/// What such requests share.
pub(crate) struct Lasting {
    most: usize,
    places: Arc<Semaphore>,
    helpers: Arc<Semaphore>,
}

/// Whether the answer needs no data to be moved and nobody to be waited for.
pub(crate) fn is_quick(request: &StorageRequest) -> bool {
    match request {
        StorageRequest::Status => true,
        StorageRequest::Pool(operation) | StorageRequest::Begin(operation) => matches!(
            operation,
            Operation::PauseJob { .. }
                | Operation::ResumeJob { .. }
                | Operation::ThrottleJob { .. }
                | Operation::SetJobPriority { .. }
        ),
        _ => false,
    }
}

impl Lasting {
    /// `most` at a time, of which `helpers` have a thread.
    pub(crate) fn new(most: usize, helpers: usize) -> Self {
        Self {
            most,
            places: Arc::new(Semaphore::new(most)),
            helpers: Arc::new(Semaphore::new(helpers)),
        }
    }

    /// Room for one more, until what is returned is dropped.
    pub(crate) fn room(&self) -> Result<OwnedSemaphorePermit, Problem> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let detail = format!("{} requests that last are under way already", self.most);
            Problem::new(ProblemKind::Exhausted, detail).remedy("try again when one of them has ended")
        })
    }

    /// As [`routes::help`], with a thread when one is free; the time until then counts.
    pub(crate) async fn help<T: Send + 'static>(
        &self,
        limit: Duration,
        question: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let until = Instant::now() + limit;
        let _room = self.room()?;
        let helper = timeout_at(until, Arc::clone(&self.helpers).acquire_owned()).await;
        let Ok(Ok(helper)) = helper else {
            let detail = "so many requests were worked on that this one had no turn";
            return Err(Problem::new(ProblemKind::Timeout, detail).remedy("try again when some have ended"));
        };
        routes::help(until.saturating_duration_since(Instant::now()), move || {
            let answered = question();
            // Not before: the thread is taken even if nobody waits for the answer any more.
            drop(helper);
            answered
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn there_is_a_number_of_them_and_fewer_have_a_thread() {
        let lasting = Arc::new(Lasting::new(2, 1));
        let (go_on, waits) = std::sync::mpsc::channel::<()>();
        let minute = Duration::from_secs(60);
        let first = Arc::clone(&lasting);
        let first = tokio::spawn(async move { first.help(minute, move || Ok(waits.recv().is_ok())).await });
        let second = Arc::clone(&lasting);
        let second = tokio::spawn(async move { second.help(Duration::from_millis(1), || Ok(())).await });
        assert_eq!(second.await.unwrap().unwrap_err().kind, ProblemKind::Timeout);
        let third = Arc::clone(&lasting);
        let third = tokio::spawn(async move { third.help(minute, || Ok(())).await });
        tokio::task::yield_now().await;
        let refused = lasting.help(minute, || Ok(())).await.unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Exhausted);
        // The thread works on, and counts, when nobody waits.
        first.abort();
        let _ = first.await;
        assert_eq!(lasting.helpers.available_permits(), 0);
        go_on.send(()).unwrap();
        third.await.unwrap().unwrap();
        assert_eq!(lasting.places.available_permits(), 2);
    }
}
