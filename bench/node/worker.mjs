// A worker process that uses npm redfour or ioredfour, as worker.go uses the Go libraries: it is given one task, and says what came of it.
//
//   <- {"library": "redfour", "addr": "127.0.0.1:6379", "workload": "contend", "process": 0, "waiters": 16, "ids": 1,
//       "section_us": 0, "ttl_ms": 10000, "hold_ms": [2, 4], "pause_ms": 1, "sections_file": "0.bin"}
//   -> {"ready": true}
//   <- go
//   <- stop, or the end of the input
//   -> {"sections": 4711, "per_waiter": [295, …], "errors": 0, "error": "", "cpu_s": 1.9, "rss": 73400320}
//
// The library is named as its package is, and the waiters are those of this process. In a cluster, "cluster" has the addresses of all masters.
// "idle" adds "heap_stack", in bytes of all waiters together.
// Both libraries work in their default namespace, "lock", so that a Lock of this repository can hold what the waiters of "idle" wait for.

import { writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

// Old packages on new versions of Node.js use what is deprecated.
process.noDeprecation = true;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const nextLine = async () => (await lines.next()).value; // undefined at the end of the input
const say = message => process.stdout.write(JSON.stringify(message) + '\n');
function fail(err) {
  console.error(err);
  process.exit(1);
}

const task = JSON.parse(await nextLine());
const { default: Lock } = await import(task.library);
const cluster = task.cluster?.map(addr => ({ host: addr.split(':')[0], port: Number(addr.split(':')[1]) }));
const lock = new Lock(cluster ? { cluster } : { redis: `redis://${task.addr}` });

// A broken connection would be made again, and that be measured.
lock._redisConnection.on('error', fail);
lock._redisSubscriber.on('error', fail);

// Both libraries take callbacks.
const call = (object, method) => promisify(object[method].bind(object));
const acquire = call(lock, 'acquireLock');
const waitAcquire = call(lock, 'waitAcquireLock');
const releaseLock = call(lock, 'releaseLock');

async function release(lease) {
  const { result } = await releaseLock(lease);
  if (result !== 'released') throw new Error(`release "${lease.id}": ${result}`);
}

// hrtime counts from the zero of CLOCK_MONOTONIC, which all processes of a machine share.
const now = process.hrtime.bigint;

// A waiter knows since when it has been waiting. It does not wait while that is 0.
const waiters = Array.from({ length: task.waiters }, (_, n) => ({ n, sections: 0, wanted: 0n }));
const sharedID = n => task.ids > 1 ? `contended-${n % task.ids}` : 'contended';
let stopping = false;

// count counts a section, unless the end came before its own.
function count(waiter) {
  if (!stopping) waiter.sections++;
}

// records has four numbers for each section: who waited, since when, when that ended, and when the release began.
const records = [];

const inside = new Set(); // the sections that are not over, as promises

// section waits for the lock that the waiter shares with others, and holds it for some ms.
async function section(waiter, ms) {
  waiter.wanted = now();
  const lease = await waitAcquire(sharedID(waiter.n), task.ttl_ms, 0);
  const held = now();
  // The libraries cannot stop waiting. Whoever is let in after the end was still waiting when it came.
  if (stopping) return release(lease);
  const done = hold(waiter, lease, held, ms);
  inside.add(done);
  await done;
  inside.delete(done);
}

async function hold(waiter, lease, held, ms) {
  const { wanted } = waiter;
  waiter.wanted = 0n;
  if (ms > 0) await sleep(ms);
  records.push(BigInt(waiter.n), wanted, held, now());
  await release(lease);
  count(waiter);
}

// What a waiter does in each workload until it is told to stop.
const workloads = {
  // Nobody else has the id, so an attempt succeeds, and a release finds what the attempt left.
  async cycles(waiter) {
    const id = `p${task.process}-${waiter.n}`;
    while (!stopping) {
      const lease = await acquire(id, task.ttl_ms);
      if (!lease.success) throw new Error(`acquire "${id}": somebody has it`);
      await release(lease);
      count(waiter);
    }
  },

  async contend(waiter) {
    while (!stopping) await section(waiter, task.section_us / 1000);
  },

  // A timer of Node.js takes whole ms, and drops the rest.
  async handover(waiter) {
    const [least, most] = task.hold_ms;
    while (!stopping) {
      await section(waiter, least + (most - least) * Math.random());
      await sleep(task.pause_ms);
    }
  },

  // The parent holds the locks.
  async idle(waiter) {
    await waitAcquire(sharedID(waiter.n), task.ttl_ms, 0);
    throw new Error(`wait for "${sharedID(waiter.n)}": nobody had it`);
  }
};

let ready = false;
let errors = 0;
let error = '';

// start lets everybody work, and returns what ends when they have stopped. Who has seen an error does not go on.
const start = () => Promise.all(waiters.map(waiter => workloads[task.workload](waiter).catch(err => {
  if (!ready) fail(err);
  errors++;
  error ||= String(err);
})));

// warmUp returns when the subscription stands, the server has the scripts, and V8 has seen the code.
async function warmUp() {
  // The libraries do not say when they are subscribed. Subscribing again is confirmed after the first time.
  const [subscribe, channel] = cluster ? ['ssubscribe', lock._releaseChannel] : ['subscribe', 'lock-release'];
  await call(lock._redisSubscriber, subscribe)(channel);
  for (const end = now() + 300_000_000n; now() < end;) {
    const lease = await waitAcquire(`warm-${task.process}`, task.ttl_ms, 0);
    await release(lease);
  }
}

// startIdle returns when everybody waits. In both libraries that is when they listen for the key.
async function startIdle() {
  let listening = 0;
  const all = new Promise(resolve => {
    lock._subscribers.on('newListener', () => { if (++listening === task.waiters) resolve(); });
  });
  start();
  await all;
}

setFlagsFromString('--expose-gc');
const collectGarbage = runInNewContext('gc');

// heap is what survives a collection. Unlike a goroutine, who waits in Node.js has no stack.
function heap() {
  collectGarbage();
  return process.memoryUsage().heapUsed;
}

async function main() {
  await warmUp();
  let memory = {};
  if (task.workload === 'idle') {
    const before = heap();
    await startIdle();
    memory = { heap_stack: heap() - before };
  }
  ready = true;
  say({ ready });
  if (await nextLine() !== 'go') return;

  const cpu = process.cpuUsage();
  const working = task.workload === 'idle' ? undefined : start();
  await nextLine();
  stopping = true;
  const { user, system } = process.cpuUsage(cpu);
  await (task.workload === 'cycles' ? working : Promise.allSettled(inside));

  // Who still waits has a record of that, without the times that have not come.
  for (const { n, wanted } of waiters) {
    if (wanted !== 0n) records.push(BigInt(n), wanted, 0n, 0n);
  }
  if (task.workload === 'contend' || task.workload === 'handover') {
    // This is little-endian on everything that Node.js runs on.
    writeFileSync(task.sections_file, BigInt64Array.from(records));
  }
  say({
    sections: waiters.reduce((sum, { sections }) => sum + sections, 0),
    per_waiter: waiters.map(({ sections }) => sections),
    errors,
    error,
    cpu_s: (user + system) / 1e6,
    rss: process.memoryUsage.rss(),
    ...memory
  });
}

main().then(() => process.exit(0), fail);
