// Package redistest starts real Redis servers for tests, because miniredis does not show what a real one does with scripts, replication,
// memory limits or dying.
//
// Each server is a process of its own on a port of its own, needs redis-server in PATH, and ends with its test. Without
// redis-server a test is skipped, or fails where the environment variable REDFOUR_REQUIRE_REDIS is "1".
package redistest
