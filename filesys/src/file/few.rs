//! A list that is mostly one: the first item needs no memory of its own.

/// Items in order.
#[derive(Debug)]
pub(crate) struct Few<T> {
    first: Option<T>,
    more: Vec<T>,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self {
            first: None,
            more: Vec::new(),
        }
    }
}

impl<T> Few<T> {
    pub(crate) fn push(&mut self, item: T) {
        if self.first.is_none() {
            self.first = Some(item);
        } else {
            self.more.push(item);
        }
    }

    /// The only item, if there is just one.
    pub(crate) fn only(&self) -> Option<&T> {
        self.first.as_ref().filter(|_| self.more.is_empty())
    }

    pub(crate) fn last_mut(&mut self) -> Option<&mut T> {
        self.more.last_mut().or(self.first.as_mut())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.first.iter().chain(&self.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_stay_in_order_and_one_is_the_only_one() {
        let mut few = Few::default();
        assert_eq!(few.only(), None);
        assert_eq!(few.last_mut(), None);
        few.push(1);
        assert_eq!(few.only(), Some(&1));
        few.push(2);
        few.push(3);
        assert_eq!(few.only(), None);
        assert_eq!(few.last_mut(), Some(&mut 3));
        assert_eq!(few.iter().copied().collect::<Vec<_>>(), [1, 2, 3]);
    }
}
