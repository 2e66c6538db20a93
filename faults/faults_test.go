package faults

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/logging"
)

var (
	seed    = flag.Uint64("seed", 1, "the schedule of the faults is a function of this")
	passes  = flag.Int("passes", 1, "how often each fault happens, with a seed of its own each time")
	minutes = flag.Float64("minutes", 0, "go on for so long, instead of counting passes")
)

func TestMain(m *testing.M) {
	if RunWorker() || RunBurner() {
		return
	}
	logging.Disable() // go-redis reports every connection that the faults break
	registerToxics()
	flag.Parse()
	code := m.Run()
	if len(all.rows) > 0 {
		remark := fmt.Sprintf(", from seed %d on", *seed)
		if !haveNPM() {
			remark += ", WITHOUT npm redfour: " + installNPM
		}
		fmt.Print(all.table(remark, code != 0))
	}
	if _, err := exec.LookPath("redis-server"); err != nil {
		fmt.Println("verdict: NONE, because redis-server is not in PATH: install it (Debian's package has the same name)")
	}
	os.Exit(code)
}

const installNPM = "install Node.js 20, and run npm ci in interop/"

// all is what TestFaults reports when everything has ended.
var all = newReport()

// needServer ends a test that needs a server, where there is none to start.
func needServer(t *testing.T) {
	t.Helper()
	_, err := exec.LookPath("redis-server")
	switch {
	case err == nil:
	case os.Getenv("REDFOUR_REQUIRE_REDIS") == "1":
		t.Fatal("redis-server is not in PATH, and REDFOUR_REQUIRE_REDIS=1 demands it")
	default:
		t.Skip("redis-server is not in PATH: nothing was attacked")
	}
}

func TestFaults(t *testing.T) {
	needServer(t)
	if !haveNPM() && os.Getenv("REDFOUR_REQUIRE_INTEROP") == "1" {
		t.Error("npm redfour cannot take part, and REDFOUR_REQUIRE_INTEROP=1 demands it: " + installNPM)
	}
	until := time.Now().Add(time.Duration(*minutes * float64(time.Minute)))
	for pass := 0; pass < *passes && *minutes == 0 || time.Now().Before(until); pass++ {
		passSeed := *seed + uint64(pass)
		t.Run(fmt.Sprintf("seed=%d", passSeed), func(t *testing.T) { runPass(t, passSeed) })
	}
}

// runPass lets each fault happen once, two at a time where they are not about the machine.
func runPass(t *testing.T, seed uint64) {
	t.Helper()
	for place, f := range append(faults(), mixed(seed), mixed(seed+1<<32)) {
		t.Run(f.name, func(t *testing.T) {
			if !f.alone {
				t.Parallel()
			}
			v := &verdict{violations: []string{"end: the run was broken off"}}
			defer func() { all.add(place, f.name, v) }() // also when the run fails before it is judged
			v = runFault(t, f, seed<<8+uint64(place))
			for _, violation := range v.violations {
				t.Error(violation)
			}
		})
	}
}
