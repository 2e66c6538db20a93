package otelredfour_test

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
)

// dashboard is what is read of dashboard.json.
type dashboard struct {
	Templating struct {
		List []struct {
			Name       string
			Type       string
			Definition string
			Query      any
		}
	}
	Panels []struct {
		ID          int
		Title       string
		Description string
		Datasource  struct{ UID string }
		Targets     []struct{ Expr, LegendFormat string }
	}
}

// exported are the names that Prometheus gets: of metrics; of their labels; and the values of these.
type exported map[string]map[string][]string

func TestDashboard(t *testing.T) {
	have := exports(t)
	file, err := os.ReadFile("dashboard.json")
	require.NoError(t, err)
	require.Empty(t, problems(t, string(file), have))

	// What the check is for.
	for _, mistake := range []struct{ old, new, want string }{
		{"sum(rate(redfour_grant_claimed_total{", "sum(rate(redfour_grants_claimed_total{", "redfour_grants_claimed_total is not exported"},
		{"redfour_hold_duration_seconds_bucket", "redfour_hold_duration_bucket", "redfour_hold_duration_bucket is not exported"},
		{"redfour_lease_lost_total", "redfour_lease_released_total", "redfour_lease_lost_total is in no panel"},
		{"sum by (redfour_wakeup_cause)", "sum by (cause)", "no label cause"},
		{"sum by (redfour_acquire_outcome)", "sum by (redfour_renewal_outcome)", "no label redfour_renewal_outcome"},
		{"{redfour_namespace=~", "{namespace=~", "no label namespace"},
		{`at_once|after_wait`, `at_once|waited`, "redfour_acquire_outcome is never waited"},
		{`redfour_acquire_outcome=\"failed\"`, `redfour_acquire_outcome=\"error\"`, "redfour_acquire_outcome is never error"},
		{`redfour_renewal_attempts_total{redfour_namespace=~\"$namespace\"}`, `redfour_renewal_attempts_total`, "is of all namespaces"},
		{"{{error_type}}", "{{type}}", "no label type in the legend"},
		{"label_values(redfour_acquire_calls_total", "label_values(redfour_calls_total", "redfour_calls_total is not exported"},
		{"redfour_namespace)\",\n          \"refId\"", "namespace)\",\n          \"refId\"", "no label namespace"},
	} {
		require.Contains(t, string(file), mistake.old)
		found := problems(t, strings.ReplaceAll(string(file), mistake.old, mistake.new), have)
		require.Contains(t, strings.Join(found, "\n"), mistake.want, mistake.old)
	}
}

// exports returns what the Prometheus exporter makes of runs in which every metric moves.
func exports(t *testing.T) exported {
	t.Helper()
	have := make(exported)
	seen, moved := make(map[string]bool), make(map[string]bool)
	for _, test := range metricTests {
		registry := prometheus.NewRegistry()
		reader, err := otelprometheus.New(otelprometheus.WithRegisterer(registry))
		require.NoError(t, err)
		bubble(t, func(t *testing.T, s *scene) {
			happen := test.prepare(t, s)
			for point := range s.moved(t, happen) {
				moved[point] = true
			}
			families, err := registry.Gather()
			require.NoError(t, err)
			for _, f := range families {
				if f.GetName() != "target_info" { // of the program, and not of what it measures
					have.add(f)
				}
			}
			for _, p := range collect(t, s.reader) {
				seen[p.String()] = true
			}
		}, reader)
	}
	for point := range seen {
		require.True(t, moved[point], point)
	}
	return have
}

// add takes a metric under all names that its series have.
func (e exported) add(f *dto.MetricFamily) {
	suffixes := []string{""}
	if f.GetType() == dto.MetricType_HISTOGRAM {
		suffixes = []string{"_bucket", "_sum", "_count"}
	}
	for _, suffix := range suffixes {
		labels := e[f.GetName()+suffix]
		if labels == nil {
			labels = make(map[string][]string)
			e[f.GetName()+suffix] = labels
		}
		if suffix == "_bucket" {
			labels["le"] = nil
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = append(labels[l.GetName()], l.GetValue())
			}
		}
	}
}

// problems returns what is wrong with a dashboard for these metrics.
func problems(t *testing.T, file string, have exported) []string {
	t.Helper()
	var d dashboard
	require.NoError(t, json.Unmarshal([]byte(file), &d))
	c := &checker{have: have, shown: make(map[string]bool)}
	var names []string
	for _, v := range d.Templating.List {
		names = append(names, v.Type+" "+v.Name)
		if v.Type == "query" {
			query, _ := v.Query.(map[string]any)
			c.variable(v.Definition)
			c.variable(fmt.Sprint(query["query"]))
		}
	}
	require.Equal(t, []string{"datasource datasource", "query namespace"}, names)
	ids := make(map[int]bool)
	for _, p := range d.Panels {
		require.False(t, ids[p.ID], p.Title)
		ids[p.ID] = true
		require.NotEmpty(t, p.Title)
		require.NotEmpty(t, p.Description, p.Title)
		require.Equal(t, "${datasource}", p.Datasource.UID, p.Title)
		require.NotEmpty(t, p.Targets, p.Title)
		for _, target := range p.Targets {
			c.query(target.Expr, target.LegendFormat)
		}
	}
	for name := range have {
		if !c.shown[base(name)] {
			c.add("%s is in no panel", name)
		}
	}
	return c.found
}

// base is the name that the series of one histogram have in common.
func base(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if before, ok := strings.CutSuffix(name, "_seconds"+suffix); ok {
			return before
		}
	}
	return name
}

// A checker compares queries with what is exported.
type checker struct {
	have  exported
	shown map[string]bool // what stands in a panel, by base
	found []string
}

func (c *checker) add(format string, args ...any) {
	c.found = append(c.found, fmt.Sprintf(format, args...))
}

var labelValues = regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`)

// variable checks the query of a variable.
func (c *checker) variable(query string) {
	parts := labelValues.FindStringSubmatch(query)
	if parts == nil {
		c.add("unknown query %s", query)
		return
	}
	c.label(parts[1], parts[2], query)
}

// label checks that a metric has a label.
func (c *checker) label(metric, label, query string) {
	labels, ok := c.have[metric]
	if !ok {
		c.add("%s is not exported: %s", metric, query)
		return
	}
	if _, ok := labels[label]; !ok {
		c.add("%s has no label %s: %s", metric, label, query)
	}
}

var (
	token  = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|\[[^]]*\]|[A-Za-z_:][\w:]*|[=!]~|!=|[\d.]+|\S`)
	name   = regexp.MustCompile(`^[A-Za-z_:][\w:]*$`)
	legend = regexp.MustCompile(`{{\s*(\w+)\s*}}`)
)

// query checks a query in PromQL, of the kinds that the dashboard has: a name is a function if a parenthesis or a grouping
// follows it, a label within braces or in a grouping, and a metric otherwise.
func (c *checker) query(query, legendFormat string) {
	tokens := append(token.FindAllString(query, -1), "")
	var metrics, grouped []string
	for n := 0; n < len(tokens); n++ {
		next := tokens[min(n+1, len(tokens)-1)]
		switch word := tokens[n]; {
		case word == "by":
			for n += 2; tokens[n] != ")"; n++ {
				if tokens[n] != "," {
					grouped = append(grouped, tokens[n])
				}
			}
		case !name.MatchString(word) || next == "(" || next == "by":
		default:
			metrics = append(metrics, word)
			c.shown[base(word)] = true
			end := n
			if next == "{" {
				end = n + slices.Index(tokens[n:], "}")
			}
			c.matchers(word, tokens[n+1:max(n+1, end)], query)
			n = end
		}
	}
	if len(metrics) == 0 {
		c.add("no metric: %s", query)
	}
	for _, metric := range metrics {
		for _, label := range grouped {
			c.label(metric, label, query)
		}
	}
	for _, found := range legend.FindAllStringSubmatch(legendFormat, -1) {
		if !slices.Contains(grouped, found[1]) {
			c.add("no label %s in the legend: %s", found[1], query)
		}
	}
}

// matchers checks what stands between the braces behind a metric, given with the opening one.
func (c *checker) matchers(metric string, tokens []string, query string) {
	namespace := false
	for len(tokens) > 3 { // brace or comma, label, operator, value
		label, value := tokens[1], strings.Trim(tokens[3], `"`)
		tokens = tokens[4:]
		c.label(metric, label, query)
		if value == "$namespace" {
			namespace = true
			continue
		}
		for one := range strings.SplitSeq(value, "|") {
			if !slices.Contains(c.have[metric][label], one) {
				c.add("%s is never %s: %s", label, one, query)
			}
		}
	}
	if _, ok := c.have[metric]; !ok {
		c.add("%s is not exported: %s", metric, query)
	}
	if !namespace {
		c.add("%s is of all namespaces: %s", metric, query)
	}
}
