// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The compiler's words about a type that is not `Send` name its innermost fields, those of other crates included. So this
// is said the other way round: the call below is ambiguous, and does not compile, where `Scope` is `Send`.
use notifier_core::Scope;

trait AmbiguousIfSend<A> {
    fn is_not() {}
}

impl<T: ?Sized> AmbiguousIfSend<()> for T {}

struct Send_;
impl<T: ?Sized + Send> AmbiguousIfSend<Send_> for T {}

fn main() {
    <Scope<'static> as AmbiguousIfSend<_>>::is_not();
}
