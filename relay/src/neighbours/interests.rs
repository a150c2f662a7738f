//! What somebody at this relay listens to, and what NATS has been asked for.

use std::collections::{HashMap, HashSet};

use super::subject::Subject;

/// Subjects that we ask for.
const MAX_SUBJECTS: usize = 200_000;

/// What somebody here listens to.
#[derive(Debug, Default)]
pub(super) struct Interests {
    /// By how many.
    wanted: HashMap<Subject, usize>,
    /// What NATS was asked for.
    asked: HashSet<Subject>,
    /// Of those wanted, what NATS was not asked for yet.
    fresh: HashSet<Subject>,
    /// Of those asked for, what nobody wants any more.
    stale: HashSet<Subject>,
}

impl Interests {
    /// Somebody wants a subject. Returns whether there was room for it.
    pub(super) fn want(&mut self, subject: &Subject) -> bool {
        if let Some(count) = self.wanted.get_mut(subject) {
            *count += 1;
            return true;
        }
        if self.wanted.len() >= MAX_SUBJECTS {
            return false;
        }
        self.wanted.insert(subject.clone(), 1);
        if !self.stale.remove(subject) && !self.asked.contains(subject) {
            self.fresh.insert(subject.clone());
        }
        true
    }

    /// Somebody who wanted a subject no longer does.
    pub(super) fn leave(&mut self, subject: &Subject) {
        let Some(count) = self.wanted.get_mut(subject) else { return };
        *count -= 1;
        if *count == 0 {
            self.wanted.remove(subject);
            // What comes and goes while NATS is away leaves nothing behind.
            if !self.fresh.remove(subject) && self.asked.contains(subject) {
                self.stale.insert(subject.clone());
            }
        }
    }

    /// What NATS is to be asked for now, and what may be left soon, since this was last asked.
    pub(super) fn changes(&mut self) -> (HashSet<Subject>, HashSet<Subject>) {
        let fresh = std::mem::take(&mut self.fresh);
        self.asked.extend(fresh.iter().cloned());
        (fresh, std::mem::take(&mut self.stale))
    }

    /// NATS could not be asked for a subject.
    pub(super) fn not_asked(&mut self, subject: &Subject) {
        self.asked.remove(subject);
    }

    /// Gives up a subject, unless somebody wants it again. Returns whether it is given up.
    pub(super) fn give_up(&mut self, subject: &Subject) -> bool {
        if self.wanted.contains_key(subject) {
            return false;
        }
        self.asked.remove(subject);
        self.stale.remove(subject);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_and_goes_while_nats_is_away_leaves_nothing_behind() {
        let mut interests = Interests::default();
        let subject = |number: usize| Subject::of("x", &number.to_string());
        interests.asked.insert(subject(0));
        for number in 0..10_000 {
            assert!(interests.want(&subject(number)) && interests.want(&subject(number)));
            interests.leave(&subject(number));
            interests.leave(&subject(number));
        }
        assert!(interests.wanted.is_empty() && interests.fresh.is_empty());
        assert_eq!(interests.stale, HashSet::from([subject(0)]));
        assert!(interests.want(&subject(0)) && interests.stale.is_empty() && interests.fresh.is_empty());
        assert!(interests.want(&subject(1)) && interests.fresh.contains(&subject(1)));
    }
}
