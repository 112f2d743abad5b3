//! Coverage marks: code names its rare branches, and a test demands that its simulation reached them.

/// Marks that this place was reached. Free in production; with the feature `sim`, counted per thread and reported in
/// `sim::Numbers::marks`.
///
/// ```
/// block_io::cover!("mirror: read repaired from the other leg");
/// ```
#[macro_export]
macro_rules! cover {
    ($name:literal) => {
        $crate::cover::reached($name)
    };
}

/// What [`cover!`] calls.
#[doc(hidden)]
#[inline(always)]
pub fn reached(name: &'static str) {
    #[cfg(feature = "sim")]
    MARKS.with_borrow_mut(|marks| *marks.entry(name).or_default() += 1);
    #[cfg(not(feature = "sim"))]
    let _ = name;
}

/// Marks reached, and how often.
#[cfg(feature = "sim")]
pub(crate) type Marks = std::collections::BTreeMap<&'static str, u64>;

#[cfg(feature = "sim")]
thread_local! {
    static MARKS: std::cell::RefCell<Marks> = const { std::cell::RefCell::new(Marks::new()) };
}

/// The marks reached on this thread since this was called last; it goes on counting in `marks`.
#[cfg(feature = "sim")]
pub(crate) fn replace(marks: Marks) -> Marks {
    MARKS.replace(marks)
}
