//! The bounded queue of events in front of one client.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use crate::subscriptions::Subscription;

/// Events that wait for one client, at most.
const MAX_EVENTS: usize = 1024;
/// Bytes of events that wait for one client, at most.
const MAX_BYTES: usize = 2 << 20;
/// A queue that has run empty gives back the memory of more events than this: most connections are idle.
const KEPT_EVENTS: usize = 16;

/// An event on its way to one subscription.
#[derive(Debug)]
pub(crate) struct Delivery {
    pub(crate) subscription: Arc<Subscription>,
    pub(crate) event: Arc<str>,
    /// When the event was published.
    pub(crate) published: Instant,
}

/// The bounded queue in front of one client: filled by those who publish, emptied by the client's own task.
///
/// It is not a channel of tokio's because an empty one of those takes 1.8 KiB, a fifth of what an idle connection may.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
}

impl Outbox {
    /// Queues an event for a subscription of this client. Returns the bytes that are queued now, or `None` when there
    /// was no room: a client that reads too slowly loses ephemeral events rather than holding up the others.
    pub(crate) fn deliver(
        &self,
        subscription: &Arc<Subscription>,
        event: &Arc<str>,
        published: Instant,
    ) -> Option<usize> {
        let mut queue = self.queue();
        let bytes = queue.bytes + event.len();
        if bytes > MAX_BYTES || queue.deliveries.len() >= MAX_EVENTS {
            return None;
        }
        queue.bytes = bytes;
        let was_empty = queue.deliveries.is_empty();
        let delivery = Delivery { subscription: Arc::clone(subscription), event: Arc::clone(event), published };
        queue.deliveries.push_back(delivery);
        drop(queue);
        if was_empty {
            self.filled.notify_one();
        }
        Some(bytes)
    }

    /// Takes the event that waits longest, if there is one.
    pub(crate) fn take(&self) -> Option<Delivery> {
        let mut queue = self.queue();
        let delivery = queue.deliveries.pop_front()?;
        queue.bytes -= delivery.event.len();
        if queue.deliveries.is_empty() && queue.deliveries.capacity() > KEPT_EVENTS {
            queue.deliveries = VecDeque::new();
        }
        Some(delivery)
    }

    /// Waits for an event, and takes it. Cancelled, it takes none.
    pub(crate) async fn next(&self) -> Delivery {
        loop {
            if let Some(delivery) = self.take() {
                return delivery;
            }
            // A notification that came since is kept: none is missed.
            self.filled.notified().await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subscriptions::Subscriptions;

    fn subscription(outbox: &Arc<Outbox>) -> Arc<Subscription> {
        Subscriptions::default().add("s", 1, Arc::default(), Box::default(), Arc::clone(outbox))
    }

    #[test]
    fn a_full_queue_refuses_until_something_is_taken() {
        let outbox = Arc::new(Outbox::default());
        let subscription = subscription(&outbox);
        let now = Instant::now();
        let small: Arc<str> = "small".into();
        for queued in 1..=MAX_EVENTS {
            assert_eq!(outbox.deliver(&subscription, &small, now), Some(queued * small.len()));
        }
        assert_eq!(outbox.deliver(&subscription, &small, now), None);
        assert!(outbox.take().is_some());
        assert!(outbox.deliver(&subscription, &small, now).is_some());
        while outbox.take().is_some() {}

        let large: Arc<str> = "x".repeat(MAX_BYTES / 2).into();
        assert!(outbox.deliver(&subscription, &large, now).is_some());
        assert_eq!(outbox.deliver(&subscription, &large, now), Some(MAX_BYTES));
        assert_eq!(outbox.deliver(&subscription, &small, now), None);
        assert!(outbox.take().is_some());
        assert!(outbox.deliver(&subscription, &small, now).is_some());
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_gets_everything_in_order() {
        const EVENTS: usize = 20_000;
        let outbox = Arc::new(Outbox::default());
        let subscription = subscription(&outbox);
        let publisher = {
            let outbox = Arc::clone(&outbox);
            tokio::spawn(async move {
                for number in 0..EVENTS {
                    let event: Arc<str> = number.to_string().into();
                    while outbox.deliver(&subscription, &event, Instant::now()).is_none() {
                        tokio::task::yield_now().await;
                    }
                }
            })
        };
        for number in 0..EVENTS {
            assert_eq!(*outbox.next().await.event, *number.to_string());
        }
        publisher.await.unwrap();
        assert!(outbox.queue().deliveries.capacity() <= KEPT_EVENTS);
    }
}
