/*
 * A model of the queue that hands one lock over: docs/protocol.md, "The queue". README.md
 * beside this file says how to run it and how to read what it finds.
 *
 * There is one lock. M members (processes that use this library) have W waiters
 * each, who come, wait, hold, release, and do not come back. A script, a reply and
 * a message are steps of their own, each atomic, and they overtake each other
 * as they like; only the messages of one subscription keep their order.
 *
 * Faults come out of a budget, so every run is finite. That makes "every waiter is
 * served in the end" a question of end states: when nothing else can happen, a
 * living waiter who still waits has missed a wake-up. Only then does time
 * pass (see the process "time"): the lease ends and the timers fire. TIMERS says how often that may be
 * needed; it is 0 where only crashes and lost leases excuse it.
 *
 * Safety is checked by assertions: there are never two holders, no holder's lease is
 * released by somebody else, and a lease that is given to a waiter is in
 * force. They stand beside what they check.
 *
 * What can be set with -D, and its default:
 *   M=2 W=2    members, and waiters of each
 *   LAST=W     waiters of the last member
 *   NPM=0      how often a client of npm redfour comes for the lock
 *   HOPS=2     every HOPS-th hop is an open release, if an npm client listens
 *   BOUND      the most leases that may pass by an npm client that waits
 *   CANCEL=0   how many waiters may give up
 *   DROP=0     how many subscriptions may break
 *   LOST=0     how many replies, or requests, may be lost
 *   ZOMB=0     how many leaves and releases may be delayed, sent again, and run a second time later
 *   LATE=0     the same for attempts: they can take a free lock for nobody, until its lease ends
 *   CRASH=0    how many members may crash
 *   DL=0       how many leases may pass their deadline while they are held or granted
 *   LAZY       a waiter does not ask while his member holds or releases the lock: fewer attempts, so it
 *              tests harder that the answer of a release tells the member enough
 *   TIMERS=0   how often time may pass before everybody is served
 *   V_...      leaves a rule out, to see that it is needed. Each variant stands as an #ifdef
 *              at the rule that it breaks.
 */
#ifndef M
#define M 2
#endif
#ifndef W
#define W 2
#endif
#ifndef LAST
#define LAST W
#endif
#ifndef NPM
#define NPM 0
#endif
#ifndef HOPS
#define HOPS 2
#endif
#ifndef BOUND
#define BOUND 255
#endif
#ifndef CANCEL
#define CANCEL 0
#endif
#ifndef DROP
#define DROP 0
#endif
#ifndef LOST
#define LOST 0
#endif
#ifndef ZOMB
#define ZOMB 0
#endif
#ifndef LATE
#define LATE 0
#endif
#ifndef CRASH
#define CRASH 0
#endif
#ifndef DL
#define DL 0
#endif
#ifndef TIMERS
#define TIMERS 0
#endif

/* ------------------------------------------------------------------ state */

#define INDEXES 24          /* indexes run from 1; 0 is none */
#define SLOTS   2           /* releases in flight, for each member */
#define INBOX   8           /* messages in flight, for each member */
#define QUEUE   (3*M)       /* entries in the queue */

/* Redis. The lock's owner is a member + 1, or NPM_TOKEN; 0 means that the lock is free. */
#define NPM_TOKEN 100
byte lock_index, lock_owner, hops;
byte counter;
bit  late[INDEXES];         /* the deadline of this index has passed */
byte queue[QUEUE], queued_n; /* entries, first come first */

/* An entry in the queue is a member and a nonce. */
#define ENTRY(m,nonce)  ((nonce)*M + (m))
#define MEMBER(entry)   ((entry) % M)

/* What the server thinks of a member's subscription. HALF_OPEN counts as a subscriber,
 * but the messages to it vanish. */
#define GONE      0
#define STANDS    1
#define HALF_OPEN 2
byte sub[M];

/* Messages on their way: the index of a grant, or one of these. */
#define RELEASED  0         /* from the release channel */
#define CONFIRMED 255       /* the subscription stands */
byte inbox[M*INBOX], inbox_n[M];

/* Members. up: as the member believes, its subscription is confirmed. */
bit  alive[M], up[M];

/* Waiters, in the order in which they come. */
#define WAITER(m,w) ((m)*W + (w))
#define ABSENT  0
#define WAITS   1
#define HOLDS   2
#define OVERDUE 3           /* holds, but its deadline has passed */
#define DONE    4
byte state[M*W], holds[M*W], came[M];

/* The member's state for the lock. */
byte claimed[M];            /* the highest index that passed the gate */
byte seen[M];               /* the highest index in any reply or message */
bit  queued[M];             /* it may be in the queue, or own the lock without knowing */
byte nonce[M];
byte turn[M];               /* hand-overs left before others have their turn */

/* The latch: the member is to look at the lock. */
#define NOW   1
#define LATER 2             /* after the pause that follows a release message */
byte wake[M];
bit  timer[M];              /* the timer woke it */

/* The one attempt or leave that is in flight, and what it carries. */
#define NONE     0
#define ATTEMPT  1
#define TRIED    2          /* the attempt was answered */
#define LEAVE    3
#define LEFT     4          /* the leave was answered */
byte flight[M];
bit  f_queues[M], f_timer[M];
bit  f_excused[M];          /* it may get the lock before the npm client: no open release caused it */
byte f_yours[M], f_claimed[M], f_nonce[M], f_came[M], f_index[M];

/* The releases in flight, and what they carry. */
#define SENT     1
#define ANSWERED 2
byte r_flight[M*SLOTS], r_index[M*SLOTS];
byte r_next[M*SLOTS];       /* 0: names no next waiter; NAMED; REQUEUE: and the member's entry */
#define NAMED    1
#define REQUEUE  2
byte r_nonce[M*SLOTS];
bit  r_turn[M*SLOTS];       /* the member's turn goes on */
byte r_status[M*SLOTS], r_found[M*SLOTS];
#define FREED    1          /* nobody waits */
#define OPENED   2          /* an open release */
#define GRANTED  3          /* granted to a member of the queue */
#define HANDED   4          /* handed to the named next waiter */
#define TAKEN    5          /* it was another index; the named next waiter holds it */
#define NOT_HELD 6          /* nobody, or another, holds it */

/* One request that was delayed and sent again: it still runs, and nobody gets its reply. */
#define RELEASE  5          /* beside ATTEMPT and LEAVE */
byte z_kind, z_member, z_index, z_next, z_nonce, z_claimed;
bit  z_queues, z_turn;

/* The npm client. It listens from its first try on. */
#define IDLE 0
byte npm_state, npm_index, npm_tries, passed_by;
bit  npm_listens, npm_message;

byte may_cancel = CANCEL, may_drop = DROP, may_lose = LOST, may_delay = ZOMB, may_try_late = LATE, may_crash = CRASH, may_be_late = DL;
byte timers;                /* how often time had to pass */

/* Work variables. No step leaves anything in them. */
hidden byte i, j, k, n, e, head, answer, value, found, mine, served, was_queued, excused, x, y, z;

/* ------------------------------------------------------------------ Redis */

/* A member lives if its inbox has a subscriber. PUBLISH counts whoever does PSUBSCRIBE *, too. */
#ifdef V_PSUB
#define LIVES(m) 1
#else
#define LIVES(m) (sub[m] != GONE)
#endif

inline send(m, message) {
	if
	:: sub[m] == STANDS -> assert(inbox_n[m] < INBOX); inbox[(m)*INBOX + inbox_n[m]] = message; inbox_n[m]++
	:: else
	fi
}

inline publish_release() {
	printf("T   redis: publishes the release\n");
#ifndef V_NOREL     /* Waiting members listen to the release channel. */
	for (i : 0 .. M-1) { send(i, RELEASED) }
#endif
	if :: npm_state == WAITS -> npm_message = 1 :: else fi
}

inline enqueue(entry) {
	found = 0;
	for (i : 0 .. QUEUE-1) { if :: i < queued_n && queue[i] == entry -> found = 1 :: else fi }
	if
	:: !found -> assert(queued_n < QUEUE); queue[queued_n] = entry; queued_n++
	:: else
	fi
}

/* dequeue takes the first entry out, into e. */
inline dequeue() {
	e = queue[0]; queued_n--;
	for (i : 0 .. QUEUE-2) { queue[i] = queue[i+1] }
	queue[QUEUE-1] = 0
}

inline remove(entry) {
	j = 0;
	for (i : 0 .. QUEUE-1) {
		if
		:: i < queued_n && queue[i] != entry -> queue[j] = queue[i]; j++
		:: else
		fi
	}
	for (i : 0 .. QUEUE-1) { if :: i >= j -> queue[i] = 0 :: else fi }
	queued_n = j
}

/* Whenever a lease is given, or released, every other member with a waiter is in the queue or has something under
 * way. Without that it would be served only after the last hand-over to others. */
#define QUIET(m) (alive[m] && up[m] && sub[m] == STANDS && inbox_n[m] == 0 && wake[m] == 0 && \
	flight[m] == NONE && r_flight[(m)*SLOTS] == 0 && r_flight[(m)*SLOTS+1] == 0)
inline nobody_is_forgotten(owner) {
	for (x : 0 .. M-1) {
		z = 0;
		for (y : 0 .. W-1) { if :: state[x*W+y] == WAITS -> z = 1 :: else fi }
		for (y : 0 .. QUEUE-1) { if :: y < queued_n && MEMBER(queue[y]) == x -> z = 0 :: else fi }
		assert(DL > 0 || owner == x+1 || !z || !QUIET(x))
	}
}

inline lease(owner) {
	nobody_is_forgotten(owner);
	counter++; assert(counter < INDEXES);
	lock_index = counter; lock_owner = owner;
	/* While an npm client waits, a bounded number of leases pass it by, not counting those of attempts
	 * that were under way, or that a newcomer made, when the client had its chance. */
	if
	:: npm_state == WAITS && owner != NPM_TOKEN && BOUND < 255 && !excused -> passed_by++; assert(passed_by <= BOUND)
	:: else
	fi
}

inline free() { lock_index = 0; lock_owner = 0; hops = 0 }

inline hop() { if :: hops < HOPS -> hops++ :: else fi }

inline grant(m) {
	lease((m) + 1); printf("T   redis: grants %d to M%d\n", lock_index, m);
	send(m, lock_index)
}

#define AGAIN 2             /* mine: the member owned the lock before this attempt */

/* The script of an attempt. It sets mine and answer: the index that is the member's, or the holder's.
 * "Yours" is said for an index above the one that the request carries, so that none is claimed twice. */
inline run_attempt(m, enters, number, above, by_timer) {
	printf("T   redis: runs attempt of M%d (lock %d of %d, %d queued)\n", m, lock_index, lock_owner, queued_n);
	mine = 0;
	if
	:: lock_index != 0 && lock_owner == (m)+1 && lock_index > (above) -> mine = AGAIN
	:: lock_index != 0 && !(lock_owner == (m)+1 && lock_index > (above)) ->
		if :: enters -> enqueue(ENTRY(m, number)) :: else fi
#ifndef V_NOPURGE   /* A timer that finds the lock free deletes the queue, and the living queue again. */
	:: lock_index == 0 && (by_timer) && queued_n > 0 ->
		for (i : 0 .. QUEUE-1) { queue[i] = 0 } queued_n = 0;
		publish_release(); lease((m)+1); mine = 1
	:: lock_index == 0 && !((by_timer) && queued_n > 0) ->
#else
	:: lock_index == 0 ->
#endif
		/* The lock is free: the first in the queue that lives is served. An attempt that cannot queue passes it by. */
		served = 0;
		do
		:: !served && (enters) && queued_n > 0 ->
			dequeue();
			if
			:: e == ENTRY(m, number) -> lease((m)+1); mine = 1; served = 1
			:: e != ENTRY(m, number) && MEMBER(e) != (m) && LIVES(MEMBER(e)) ->
				k = MEMBER(e); grant(k); enqueue(ENTRY(m, number)); served = 1
			:: else
			fi
		:: else -> break
		od;
		if :: !served -> lease((m)+1); mine = 1 :: else fi
	fi;
	answer = lock_index
}

/* The script of a leave. It sets mine and answer. */
inline run_leave(m, number, above) {
	printf("T   redis: runs leave of M%d\n", m);
	remove(ENTRY(m, number));
	mine = (lock_index != 0 && lock_owner == (m)+1 && lock_index > (above));
	answer = (mine -> lock_index : 0)
}

/* An open release gives npm clients a chance, who hear no grants. The census tells whether there is one. */
#ifdef V_NOCENSUS
#define OPEN (hops + 1 >= HOPS)
#else
#define OPEN (hops + 1 >= HOPS && npm_listens)
#endif

/* A release to nobody is published to clients that know no queue, and if Redis took the whole queue for dead. */
#ifdef V_SILENT
#define NEEDED 0
#else
#define NEEDED (was_queued || npm_listens)
#endif

/* The script of a release. It sets value to the status and answer to the index. */
inline run_release(m, index, next, number, goes_on) {
	printf("T   redis: runs release of %d by M%d (lock %d of %d, %d queued)\n", index, m, lock_index, lock_owner, queued_n);
	if
	:: lock_index == (index) ->
		nobody_is_forgotten((m)+1); excused = 0;
		/* Nobody is deprived of a lease that he works under. */
		for (i : 0 .. M*W-1) { assert(!(state[i] == HOLDS && holds[i] == (index) && alive[i/W])) }
		if
		:: OPEN -> assert(npm_listens); free(); value = OPENED; publish_release();
			for (i : 0 .. M-1) { f_excused[i] = (npm_message && flight[i] == ATTEMPT) }
		:: !(OPEN) && (next) && (goes_on) -> hop(); lease((m)+1); value = HANDED
		:: else ->
			served = 0; was_queued = (queued_n > 0);
			do
			:: !served && queued_n > 0 ->
				dequeue();
				if
				:: !((next) == REQUEUE && e == ENTRY(m, number)) && LIVES(MEMBER(e)) ->
					k = MEMBER(e); hop(); grant(k); served = 1
				:: else
				fi
			:: else -> break
			od;
			if
			:: served && (next) == REQUEUE -> value = GRANTED; enqueue(ENTRY(m, number))
			:: served && (next) != REQUEUE -> value = GRANTED
			:: !served && (next) -> hop(); lease((m)+1); value = HANDED
			:: !served && !(next) -> free(); value = FREED;
				/* A member that waits is in the queue, or looks when its subscription is confirmed. */
				if :: NEEDED -> publish_release() :: else fi
			fi
		fi
	:: lock_index != (index) && lock_owner == (m)+1 && (next) -> value = TAKEN
	:: else -> value = NOT_HELD
	fi;
	answer = lock_index
}

/* ---------------------------------------------------------------- members */

/* first sets head to the first waiter, or W if nobody waits. */
inline first(m) { head = 0; do :: head < W && state[WAITER(m,head)] != WAITS -> head++ :: else -> break od }

inline latch(m, when) {
	first(m);
	if
	:: head < W && (wake[m] == 0 || when == NOW) -> wake[m] = when
	:: else
	fi
}

#define SLOT_FREE(m) (r_flight[(m)*SLOTS] == 0 || r_flight[(m)*SLOTS+1] == 0)
#define NO_RELEASE(m) (r_flight[(m)*SLOTS] == 0 && r_flight[(m)*SLOTS+1] == 0)

/* release sends a release, naming the next waiter if there is one. */
inline release(m, index) {
	printf("T M%d sends release of %d\n", m, index);
	j = (m)*SLOTS; if :: r_flight[j] != 0 -> j++ :: else fi; assert(r_flight[j] == 0);
	first(m);
	r_flight[j] = SENT; r_index[j] = index; r_nonce[j] = nonce[m]; r_turn[j] = (turn[m] > 0);
	r_next[j] = (head == W -> 0 : (up[m] -> REQUEUE : NAMED))
}

/* The gate. Every lease that anything yields passes it: claimed by its index, once,
 * then given to the first waiter, or released if nobody waits. It sets found if the index was new. */
inline gate(m, index) {
	if
	:: (index) > claimed[m] ->
		claimed[m] = index; first(m);
		if
		:: late[index] || head == W -> release(m, index)
		:: else ->
			printf("T M%d.w%d holds %d\n", m, head, index);
			state[WAITER(m,head)] = HOLDS; holds[WAITER(m,head)] = index;
			assert(lock_index == (index) && lock_owner == (m)+1);
			n = 0; for (i : 0 .. M*W-1) { if :: state[i] == HOLDS && alive[i/W] -> n++ :: else fi }
			assert(n == 1 && npm_state != HOLDS);
			n = 0; for (i : 0 .. W-1) { if :: state[WAITER(m,i)] == WAITS -> n++ :: else fi }
			turn[m] = n
		fi;
		found = 1
	:: else -> found = 0
	fi
}

inline saw(m, index) { if :: (index) > seen[m] -> seen[m] = index :: else fi }

/* With nothing in flight the member forgets the lock. What it knows next time is the highest
 * index that it has seen of any lock. */
#ifdef V_GC
#define FLOOR(m) 0
#else
#define FLOOR(m) seen[m]
#endif

/* A leave waits for the releases in flight, because they may queue the member. */
#ifdef V_HASTY
#define LEAVE_MAY_GO(m) (flight[m] == NONE && queued[m])
#else
#define LEAVE_MAY_GO(m) (flight[m] == NONE && queued[m] && NO_RELEASE(m))
#endif

/* After a leave the member's entries have another nonce: a second run of that leave removes none of them. */
#ifdef V_NONONCE
#define RENEW_NONCE(m) skip
#else
#define RENEW_NONCE(m) nonce[m]++; assert(nonce[m] < 8)
#endif

/* settle ends every step of a member. */
inline settle(m) {
	first(m);
	if
	:: head == W ->
		wake[m] = 0; timer[m] = 0;
		if
		:: LEAVE_MAY_GO(m) ->
			queued[m] = 0;
#ifndef V_NOLEAVE   /* Nobody waits, but the member may be queued: it leaves the queue. */
			printf("T M%d sends leave\n", m);
			flight[m] = LEAVE; f_claimed[m] = claimed[m]; f_nonce[m] = nonce[m];
			RENEW_NONCE(m)
#endif
		:: else
		fi;
		if
		:: flight[m] == NONE && NO_RELEASE(m) -> claimed[m] = FLOOR(m); turn[m] = 0
		:: else
		fi
	:: else
	fi
}

inline clear_flight(m) {
	flight[m] = NONE; f_excused[m] = 0; f_queues[m] = 0; f_timer[m] = 0; f_yours[m] = 0;
	f_claimed[m] = 0; f_nonce[m] = 0; f_came[m] = 0; f_index[m] = 0
}


/* The member hears a message. */
inline hears(m, message) {
	printf("T M%d hears %d\n", m, message);
	if
	:: message == CONFIRMED ->
		/* Messages were lost while the subscription did not stand, so the member looks. */
		up[m] = 1;
#ifndef V_NOLOOK
		latch(m, NOW)
#endif
	:: message == RELEASED ->
#ifdef V_EVENT      /* A wake-up during an attempt is a latch, not an event. */
		if :: flight[m] == NONE -> latch(m, LATER) :: else fi
#else
		latch(m, LATER)
#endif
	:: else ->
		saw(m, message);
		gate(m, message);
		if
		:: found && flight[m] != ATTEMPT && flight[m] != TRIED -> queued[m] = 0
		:: else
		fi
	fi
}

/* An attempt queues the member only while its subscription is confirmed. */
#ifdef V_DEAF
#define CAN_QUEUE(m) 1
#else
#define CAN_QUEUE(m) up[m]
#endif

inline send_attempt(m) {
	printf("T M%d sends attempt for w%d\n", m, head);
	flight[m] = ATTEMPT; f_excused[m] = (npm_message && wake[m] == NOW); wake[m] = 0;
	f_timer[m] = timer[m]; timer[m] = 0;
	f_claimed[m] = claimed[m]; f_nonce[m] = nonce[m]; f_came[m] = came[m];
	f_queues[m] = CAN_QUEUE(m);
	if :: f_queues[m] -> queued[m] = 1 :: else fi
}

/* What an attempt got passes the gate like everything else, although the waiter for whom it was made has left. */
#ifdef V_ABANDON
byte f_head[M];
#define ATTEMPT_GATE(m, index) \
	if :: state[WAITER(m, f_head[m])] == DONE -> release(m, index); found = 1 :: else -> gate(m, index) fi
#else
#define ATTEMPT_GATE(m, index) gate(m, index)
#endif

#ifdef V_AGAIN
#define CLEARS_QUEUED(mine) 1
#else
#define CLEARS_QUEUED(mine) (mine != AGAIN)
#endif

inline attempt_answered(m) {
	printf("T M%d attempt answered: %d, mine %d\n", m, f_index[m], f_yours[m]);
	saw(m, f_index[m]);
	value = f_index[m]; mine = f_yours[m]; served = f_queues[m]; k = f_came[m];
	clear_flight(m);
	if
	:: mine ->
		ATTEMPT_GATE(m, value);
		/* An attempt that takes a free lock takes the member's entry out. "Again" may
		 * be about a hand-over within the member, which leaves the entry where it is. */
		if :: found && served && CLEARS_QUEUED(mine) -> queued[m] = 0 :: else fi
	:: else -> found = 0
	fi;
	/* "Held" says nothing about a first waiter who came after the attempt had begun; nor does "yours"
	 * if that lease had passed the gate before. */
#ifdef V_YOURS
	if :: mine -> found = 1 :: else fi;
#endif
#ifndef V_STALE
	first(m);
	if :: !found && head < W && head >= k -> latch(m, NOW) :: else fi
#endif
}

inline leave_answered(m) {
	printf("T M%d leave answered: %d\n", m, f_index[m]);
	value = f_index[m]; mine = f_yours[m];
	clear_flight(m);
	saw(m, value);
#ifndef V_LEAVEKEEPS /* A grant that the leave finds passes the gate. */
	if :: mine -> gate(m, value) :: else fi;
#endif
	latch(m, NOW)
}

#ifdef V_NOWAKE
#define AFTER_RELEASE(m, when) skip
#else
#define AFTER_RELEASE(m, when) latch(m, when)
#endif

/* An answer to a repeated release does not tell what the first did: it may have queued the member. */
#define REPEATED(m) if :: n == REQUEUE -> queued[m] = 1 :: else fi

/* A release was answered. The member's first waiter is served by "handed", and known to be queued
 * after "granted" to a release that named him with the member's entry. After every other answer he looks. */
inline release_answered(m, slot) {
	j = (m)*SLOTS + slot; value = r_status[j]; answer = r_found[j]; n = r_next[j];
	printf("T M%d release of %d answered: status %d, index %d\n", m, r_index[j], value, answer);
	r_flight[j] = 0; r_index[j] = 0; r_next[j] = 0; r_nonce[j] = 0; r_turn[j] = 0; r_status[j] = 0; r_found[j] = 0;
	saw(m, answer);
	if
	:: value == GRANTED && n == REQUEUE -> queued[m] = 1
	:: value == HANDED ->
		k = (turn[m] > 0 -> turn[m] - 1 : 0);
		gate(m, answer);
		if :: k > 0 -> turn[m] = k :: else fi
	:: value == TAKEN -> REPEATED(m); gate(m, answer); AFTER_RELEASE(m, NOW)
	:: value == NOT_HELD -> REPEATED(m); AFTER_RELEASE(m, NOW)
	:: value == OPENED -> AFTER_RELEASE(m, LATER)
	:: else -> AFTER_RELEASE(m, NOW)
	fi
}

inline breaks(m, how) {
	printf("T M%d: its subscription breaks (%d)\n", m, how);
	for (i : 0 .. INBOX-1) { inbox[m*INBOX+i] = 0 }
	inbox_n[m] = 0; sub[m] = how; may_drop--
}

inline crashes(m, how) {
	printf("T M%d crashes (%d)\n", m, how);
	for (i : 0 .. INBOX-1) { inbox[m*INBOX+i] = 0 }
	inbox_n[m] = 0; sub[m] = how; wake[m] = 0; alive[m] = 0; may_crash--
}

#define RELEASES(w) \
	d_step { alive[m] && SLOT_FREE(m) && (state[WAITER(m,w)] == HOLDS || state[WAITER(m,w)] == OVERDUE) -> \
		value = holds[WAITER(m,w)]; state[WAITER(m,w)] = DONE; holds[WAITER(m,w)] = 0; \
		release(m, value); settle(m) }

#define GIVES_UP(w) \
	d_step { alive[m] && may_cancel > 0 && state[WAITER(m,w)] == WAITS -> \
		printf("T M%d.w%d gives up\n", m, w); may_cancel--; state[WAITER(m,w)] = DONE; settle(m) }

#define RUNS_RELEASE(slot) \
	d_step { r_flight[m*SLOTS+slot] == SENT -> j = m*SLOTS+slot; \
		run_release(m, r_index[m*SLOTS+slot], r_next[m*SLOTS+slot], r_nonce[m*SLOTS+slot], r_turn[m*SLOTS+slot]); \
		r_flight[m*SLOTS+slot] = ANSWERED; r_status[m*SLOTS+slot] = value; r_found[m*SLOTS+slot] = answer }

#ifdef LAZY
#define ASKS(m) (NO_RELEASE(m) && lock_owner != m+1)
#else
#define ASKS(m) 1
#endif

/* The pause ends when the npm client has had its chance. */
#ifdef V_NOPAUSE
#define PAUSE_IS_OVER (wake[m] == LATER)
#else
#define PAUSE_IS_OVER (wake[m] == LATER && !npm_message)
#endif

proctype member(byte m) {
end:	do
	/* A waiter arrives. If he is the first he makes the member look, at once or after what is in flight. */
	:: d_step { alive[m] && came[m] < (m == M-1 -> LAST : W) ->
		printf("T M%d.w%d arrives\n", m, came[m]);
		first(m);
		state[WAITER(m, came[m])] = WAITS; came[m]++;
		if :: head == W && flight[m] == NONE && ASKS(m) -> latch(m, NOW) :: else fi }

	/* An attempt: one is in flight at a time. */
	:: d_step { alive[m] && flight[m] == NONE && (wake[m] == NOW || PAUSE_IS_OVER) ->
		first(m); assert(head < W);
#ifdef V_ABANDON
		f_head[m] = head;
#endif
		send_attempt(m) }
	:: d_step { flight[m] == ATTEMPT ->
		if :: f_excused[m] -> passed_by = 0; f_excused[m] = 0; excused = 1 :: else -> excused = 0 fi;
		run_attempt(m, f_queues[m], f_nonce[m], f_claimed[m], f_timer[m]);
		f_yours[m] = mine; f_index[m] = answer; flight[m] = TRIED }
	:: d_step { alive[m] && flight[m] == TRIED && SLOT_FREE(m) -> attempt_answered(m); settle(m) }

	/* A leave, in the place of an attempt. */
	:: d_step { flight[m] == LEAVE ->
		run_leave(m, f_nonce[m], f_claimed[m]);
		f_yours[m] = mine; f_index[m] = answer; flight[m] = LEFT }
	:: d_step { alive[m] && flight[m] == LEFT && SLOT_FREE(m) -> leave_answered(m); settle(m) }

	/* Releases. */
	:: RELEASES(0)
#if W > 1
	:: RELEASES(1)
#endif
#if W > 2
	:: RELEASES(2)
#endif
	:: RUNS_RELEASE(0)
	:: RUNS_RELEASE(1)
	:: d_step { alive[m] && r_flight[m*SLOTS] == ANSWERED -> release_answered(m, 0); settle(m) }
	:: d_step { alive[m] && r_flight[m*SLOTS+1] == ANSWERED -> release_answered(m, 1); settle(m) }

	/* A message arrives. */
	:: d_step { alive[m] && inbox_n[m] > 0 && SLOT_FREE(m) ->
		value = inbox[m*INBOX]; inbox_n[m]--;
		for (i : 0 .. INBOX-2) { inbox[m*INBOX+i] = inbox[m*INBOX+i+1] }
		inbox[m*INBOX+INBOX-1] = 0;
		k = value; hears(m, k); settle(m) }

	/* A waiter gives up. */
#if CANCEL > 0
	:: GIVES_UP(0)
#if W > 1
	:: GIVES_UP(1)
#endif
#if W > 2
	:: GIVES_UP(2)
#endif
#endif

	/* A reply is lost. The outcome of an attempt is unknown, so the next one asks; a leave
	 * and a release are repeated. */
#if LOST > 0
	:: d_step { alive[m] && may_lose > 0 && flight[m] == TRIED ->
		printf("T M%d loses the reply of its attempt\n", m); may_lose--;
		clear_flight(m); queued[m] = 1; latch(m, NOW); settle(m) }
	:: d_step { alive[m] && may_lose > 0 && flight[m] == LEFT ->
		printf("T M%d loses the reply of its leave\n", m); may_lose--;
		flight[m] = LEAVE; f_yours[m] = 0; f_index[m] = 0 }
	:: d_step { alive[m] && may_lose > 0 && r_flight[m*SLOTS] == ANSWERED ->
		printf("T M%d loses the reply of its release of %d\n", m, r_index[m*SLOTS]); may_lose--;
		r_flight[m*SLOTS] = SENT; r_status[m*SLOTS] = 0; r_found[m*SLOTS] = 0 }
#endif

	/* A request is delayed and sent again: it runs twice. */
#if ZOMB + LATE > 0
	:: d_step { alive[m] && may_try_late > 0 && z_kind == NONE && flight[m] == ATTEMPT ->
		printf("T M%d: its attempt is delayed and sent again\n", m); may_try_late--;
		z_kind = ATTEMPT; z_member = m; z_queues = f_queues[m]; z_nonce = f_nonce[m]; z_claimed = f_claimed[m] }
	:: d_step { alive[m] && may_delay > 0 && z_kind == NONE && flight[m] == LEAVE ->
		printf("T M%d: its leave is delayed and sent again\n", m); may_delay--;
		z_kind = LEAVE; z_member = m; z_nonce = f_nonce[m]; z_claimed = f_claimed[m] }
	:: d_step { alive[m] && may_delay > 0 && z_kind == NONE && r_flight[m*SLOTS] == SENT ->
		printf("T M%d: its release is delayed and sent again\n", m); may_delay--;
		z_kind = RELEASE; z_member = m; z_index = r_index[m*SLOTS]; z_next = r_next[m*SLOTS];
		z_nonce = r_nonce[m*SLOTS]; z_turn = r_turn[m*SLOTS] }
	:: d_step { z_kind != NONE && z_member == m ->
		printf("T   a delayed request runs\n");
		if
		:: z_kind == ATTEMPT -> excused = 0; run_attempt(m, z_queues, z_nonce, z_claimed, 0)
		:: z_kind == LEAVE -> run_leave(m, z_nonce, z_claimed)
		:: else -> run_release(m, z_index, z_next, z_nonce, z_turn)
		fi;
		z_kind = NONE; z_member = 0; z_index = 0; z_next = 0; z_nonce = 0; z_claimed = 0; z_queues = 0; z_turn = 0 }
#endif

	/* The subscription breaks, and the messages on their way are lost. The server notices or not; the
	 * member notices later, and subscribes again. */
#if DROP > 0
	:: d_step { alive[m] && may_drop > 0 && sub[m] == STANDS -> breaks(m, GONE) }
	:: d_step { alive[m] && may_drop > 0 && sub[m] == STANDS -> breaks(m, HALF_OPEN) }
	:: d_step { alive[m] && up[m] && sub[m] != STANDS -> printf("T M%d notices that its subscription broke\n", m); up[m] = 0 }
	:: d_step { alive[m] && !up[m] && sub[m] != STANDS ->
		printf("T M%d subscribes again\n", m); sub[m] = STANDS; send(m, CONFIRMED) }
#endif

	/* The member crashes, and the server notices or not. */
#if CRASH > 0
	:: d_step { alive[m] && may_crash > 0 -> crashes(m, GONE) }
	:: d_step { alive[m] && may_crash > 0 -> crashes(m, HALF_OPEN) }
#endif
	od
}



/* ------------------------------------------------------------- npm redfour */

/* An npm client takes a lock that is free, hears releases, and releases to nobody. */
inline npm_tries_it() {
	if
	:: lock_index == 0 ->
		printf("T npm takes the lock\n");
		lease(NPM_TOKEN); npm_index = lock_index; npm_state = HOLDS; passed_by = 0;
		for (i : 0 .. M*W-1) { assert(!(state[i] == HOLDS && alive[i/W])) }
	:: else -> npm_state = WAITS
	fi;
	npm_message = 0
}

proctype npm() {
end:	do
	:: d_step { npm_state == IDLE && npm_tries < NPM -> npm_tries++; npm_listens = 1; printf("T npm tries\n"); npm_tries_it() }
	:: d_step { npm_state == WAITS && npm_message -> npm_tries_it() }
	:: d_step { npm_state == HOLDS ->
		npm_state = IDLE;
		if :: lock_index == npm_index -> free(); publish_release() :: else fi;
		npm_index = 0 }
	od
}

/* -------------------------------------------------------------------- time */

proctype time() {
	bit over;
end:	do
#if DL > 0
	/* The deadline of a lease passes: its holder knows; then Redis forgets it. */
	:: d_step { may_be_late > 0 && lock_index != 0 && !late[lock_index] && lock_owner != NPM_TOKEN ->
		printf("T the deadline of %d passes\n", lock_index);
		may_be_late--; late[lock_index] = 1;
		for (i : 0 .. M*W-1) { if :: state[i] == HOLDS && holds[i] == lock_index -> state[i] = OVERDUE :: else fi } }
	:: d_step { lock_index != 0 && late[lock_index] -> printf("T   redis: %d expires\n", lock_index); free() }
#endif
	/* Nothing else can happen. If somebody still waits, only time helps: he missed his wake-up. */
	:: atomic { timeout && !over -> d_step {
		found = (npm_state == WAITS);
		for (i : 0 .. M*W-1) { if :: state[i] == WAITS && alive[i/W] -> found = 1 :: else fi }
		if
		:: found ->
			printf("T time passes\n");
			timers++; assert(timers <= TIMERS);   /* a lost wake-up, if this fails */
			if :: lock_index != 0 -> late[lock_index] = 1; free() :: else fi;
			if :: npm_state == WAITS -> npm_message = 1 :: else fi;
			for (k : 0 .. M-1) { if :: alive[k] -> latch(k, NOW); timer[k] = (wake[k] != 0) :: else fi }
		:: else -> over = 1
		fi } }
	od
}

init {
	byte m;
	atomic {
		for (m : 0 .. M-1) { alive[m] = 1; up[m] = 1; sub[m] = STANDS; run member(m) }
		run time();
		if :: NPM > 0 -> run npm() :: else fi
	}
}
