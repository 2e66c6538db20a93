// Command redfour holds a lock while a command runs, as flock does, but on Redis and across machines; and it shows, watches and ends the locks
// of a fleet, and tells whether a Redis is set up for them.
//
//	redfour run backup -- ./backup.sh
//	redfour inspect backup
//
// "redfour help" describes it, with examples and exit codes. Its locks are those of package redfour, and of npm redfour.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/redis/go-redis/v9/logging"

	"github.com/redfour-go/redfour"
)

// The exit codes, where a command that is run does not give its own. Those from 64 on are of sysexits.h, where it has one that fits.
const (
	exitNo          = 1   // the answer is no: nobody holds the lock, that lease does not, Redis is not fit for locks
	exitUsage       = 64  // the arguments make no sense
	exitUnavailable = 69  // Redis cannot be reached, or refuses
	exitLocked      = 75  // another lease holds the lock
	exitLost        = 76  // the lease was lost while the command ran
	exitNotRunnable = 126 // the command exists, and cannot be run
	exitNotFound    = 127 // there is no such command
	exitSignal      = 128 // plus the number of the signal that ended the command, or redfour before it ran
)

const exitCodes = `Exit codes:
  0        done; of "run": the command's success
  1        no: nobody holds the lock (inspect), that lease does not hold it (release), something is wrong (doctor)
  64       the arguments make no sense
  69       Redis cannot be reached, or refuses, or answered too late
  75       another lease holds the lock ("run" with --try or --wait)
  76       the lease was lost while the command ran, which was ended if it still ran
  126, 127 the command cannot be run, or does not exist
  128+n    signal n ended the command, or redfour where no command ran
Otherwise "run" exits with the status of the command.
`

const serverHelp = `
The server is that in --url, or in the environment variable REDIS_URL, or redis://localhost:6379:
  redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]   rediss:// for TLS; unix://[[USER]:PASSWORD@]/PATH for a socket
  redis://[[USER]:PASSWORD@]HOST:26379?master_name=NAME
                                                     the master that Sentinels know by this name. The user and password are the
                                                     Sentinel's; the master's are &username= and &password=; more Sentinels &addr=HOST:PORT
  redis://[[USER]:PASSWORD@]HOST:PORT --cluster      a Redis Cluster; more nodes by ?addr=HOST:PORT
Others on this machine can read arguments: put a password into REDIS_URL.

`

// A failure is an error with an exit code of its own.
type failure struct {
	code   int
	err    error
	silent bool // whoever called knows the reason: the command that was run ended like this
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func usage(format string, a ...any) error {
	return &failure{code: exitUsage, err: fmt.Errorf(format, a...)}
}

// exitCode tells what to exit with after an error.
func exitCode(err error) int {
	if f, ok := errors.AsType[*failure](err); ok {
		return f.code
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, redfour.ErrLocked):
		return exitLocked
	case errors.Is(err, redfour.ErrNotHeld):
		return exitNo
	default:
		return exitUnavailable
	}
}

// A command is one of the words that may follow "redfour".
type command struct {
	name  string
	args  string // what follows the name
	short string // what it does, in a line
	long  string // what else one should know, and examples
	make  func(t *tool, flags *flag.FlagSet) func(ctx context.Context, o operands) error
}

func commands() []command {
	return []command{
		{"run", "[flags] ID -- COMMAND [ARGUMENT…]", "hold the lock while a command runs", runHelp, newRun},
		{"inspect", "[flags] ID", "show who holds a lock, and who waits for it", inspectHelp, newInspect},
		{"watch", "[flags] ID…", "show how locks change, as they do", watchHelp, newWatch},
		{"release", "[flags] ID --index N", "end a lease whose holder is gone", releaseHelp, newRelease},
		{"doctor", "[flags]", "check whether a Redis is fit for locks, and say what to change", doctorHelp, newDoctor},
	}
}

// A tool is one call of redfour: what its commands share.
type tool struct {
	server

	json  bool
	atEnd func() // unless it is nil, when everything has been said
}

func main() {
	runtime.LockOSThread() // See dieWithParent.
	logging.Disable()      // What go-redis has to say, the errors say.
	t := new(tool)
	err := t.call(context.Background(), os.Args[1:]) //nolint:forbidigo // The program's own: each command has its signals.
	t.complain(err)
	if t.atEnd != nil {
		t.atEnd()
	}
	code := exitCode(err)
	if code == exitSignal+int(syscall.SIGINT) {
		dieOfInterrupt()
	}
	os.Exit(code)
}

// call runs the command that args begin with.
func (t *tool) call(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return usage("no command given; \"redfour help\" lists them")
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		return t.help(args[1:])
	case "version", "-version", "--version":
		fmt.Println("redfour", version())
		return nil
	}
	c, err := find(args[0])
	if err != nil {
		return err
	}
	flags := t.flags(c.name)
	do := c.make(t, flags)
	o, err := parse(flags, args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return t.help(args[:1])
	}
	if err == nil {
		err = do(ctx, o)
	}
	if f, ok := errors.AsType[*failure](err); ok && f.code == exitUsage {
		f.err = fmt.Errorf("%w; see \"redfour help %s\"", f.err, c.name)
	}
	return err
}

func find(name string) (command, error) {
	for _, c := range commands() {
		if c.name == name {
			return c, nil
		}
	}
	if strings.Contains(name, "://") {
		return command{}, usage("a URL goes behind --url, and that behind the command; see \"redfour help\"") // It may contain a password.
	}
	return command{}, usage("there is no command %q; \"redfour help\" lists those there are", name)
}

// flags returns the flags that all commands have.
func (t *tool) flags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // Errors are told like all others.
	t.server.flags(flags)
	flags.BoolVar(&t.json, "json", false, "print JSON, one object a line; ttls are in ms")
	return flags
}

// Operands are the arguments that are not flags: those before a "--", and those after it.
type operands struct {
	before, after []string
	dashes        bool // there was a "--"
}

// all returns the operands of a command for which "--" only ends the flags.
func (o operands) all() []string { return append(o.before, o.after...) }

// one returns the only operand.
func (o operands) one() (string, error) {
	all := o.all()
	if len(all) > 1 {
		return "", usage("one ID is wanted, and there are %d", len(all))
	}
	if err := checkIDs(all); err != nil {
		return "", err
	}
	return all[0], nil
}

// checkIDs returns an error if there are none, or one that cannot be one.
func checkIDs(ids []string) error {
	if len(ids) == 0 {
		return usage("which lock? An ID is missing")
	}
	for _, id := range ids {
		switch {
		case id == "":
			return usage("which lock? An ID is missing")
		case !utf8.ValidString(id):
			return usage("the ID %q is not UTF-8", id)
		}
	}
	return nil
}

// parse reads the flags in args. They may stand between and after operands, until a "--".
func parse(flags *flag.FlagSet, args []string) (operands, error) {
	var o operands
	for {
		if err := flags.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return o, err
			}
			return o, usage("%w", err)
		}
		rest := flags.Args()
		if read := len(args) - len(rest); read > 0 && args[read-1] == "--" {
			o.dashes, o.after = true, rest
			return o, nil
		}
		if len(rest) == 0 {
			return o, nil
		}
		o.before = append(o.before, rest[0])
		args = rest[1:]
	}
}

// help describes redfour, or one of its commands.
func (t *tool) help(names []string) error {
	if len(names) > 0 {
		c, err := find(names[0])
		if err != nil {
			return err
		}
		t.describe(c)
		return nil
	}
	fmt.Print("redfour holds a lock on Redis while a command runs, and shows and ends locks.\n\n")
	for _, c := range commands() {
		fmt.Printf("  redfour %-13s  %s\n", c.name, c.short)
	}
	fmt.Print("  redfour help COMMAND   describe a command, with examples\n  redfour version        tell the version\n")
	fmt.Print(serverHelp, exitCodes)
	return nil
}

func (t *tool) describe(c command) {
	flags := t.flags(c.name)
	c.make(t, flags)
	fmt.Printf("redfour %s %s\n\n%s.\n%s\nFlags:\n", c.name, c.args, strings.ToUpper(c.short[:1])+c.short[1:], c.long)
	flags.VisitAll(func(f *flag.Flag) {
		kind, text := flag.UnquoteUsage(f)
		if kind != "" {
			kind = " " + strings.ToUpper(kind)
		}
		fmt.Printf("  --%-16s  %s\n", f.Name+kind, text)
	})
	fmt.Print(serverHelp, exitCodes)
}

// version tells which redfour this is, as far as the build knows.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}

// complain tells what went wrong, if anything did.
func (t *tool) complain(err error) {
	if f, ok := errors.AsType[*failure](err); err == nil || ok && f.silent {
		return
	}
	if !t.json {
		t.say(err.Error())
		return
	}
	object := map[string]any{"error": err.Error(), "exit": exitCode(err)}
	if locked, ok := errors.AsType[*redfour.LockedError](err); ok {
		object["holder"] = map[string]any{"index": locked.Index, "ttl": locked.TTL.Milliseconds(), "owner": locked.Owner}
	}
	t.printJSON(os.Stderr, object)
}

// say tells people something that is not the result.
func (t *tool) say(text string) {
	fmt.Fprintln(os.Stderr, "redfour:", printable(strings.TrimPrefix(text, "redfour: ")))
}

func (t *tool) printJSON(w io.Writer, object any) {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(object) // Whoever closed the output does not want to know.
}
